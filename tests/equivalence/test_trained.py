"""Private = PEFT on trained models: logits on PEFT's own texts, and free-running greedy text for 20 prompts."""

import importlib.resources
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from equivalence.support import (
    NO_SHARED,
    SHARED,
    TRAINED_LIMIT,
    Case,
    Served,
    draw_case,
    endless,
    greedy,
    logits,
    made_case,
    report,
    same_greedy,
    served_by_both,
)

Record = Callable[[str, object], None]

NEW_TOKENS = 64
EMBEDDED = Path(str(importlib.resources.files("splitveil"))) / "embedded"

# Cut to equally many tokens, so that no padding is involved here (test_generation.py is about padding).
STORIES = """\
Once upon a time there was a little girl named
One day, a boy and his dog went to the
The sun was shining and the birds were singing in
Lily and her mom went to the park to play
There was a big tree in the middle of the
Tom was very sad because he lost his red ball
In a small house near the sea lived an old
The cat saw a mouse under the table and it
Every night, the little bear looked at the moon and
Ben wanted to help his dad fix the old car
A small bird fell from its nest in the rain
Mia found a shiny key in the garden and she
The king had a secret room full of golden toys
It was cold outside, so the children stayed in the
Sam and Anna made a big castle out of sand
The frog jumped into the pond and began to swim
Grandma baked a cake with apples and sugar for the
A friendly dragon lived on top of a high mountain
When the rain stopped, they saw a rainbow in the
The teacher asked the children to draw a picture of""".splitlines()

QUESTIONS = """\
What are the first symptoms of diabetes in an adult?
How long does a cold usually last before it goes?
What should I do about a fever in a child?
Which treatments help against migraine and other bad headaches?
What is the difference between a virus and a bacterium?
How is high blood pressure diagnosed and treated by doctors?
Can stress cause chest pain and a fast heart beat?
What are the side effects of antibiotics in older people?
Why do my knees hurt when I walk down stairs?
How can I tell if a burn needs a doctor?
What causes asthma, and can it be cured with medicine?
Is it safe to exercise with a sprained ankle again?
Who should get a flu vaccine every year and why?
What does it mean if my iron level is low?
How much sleep does a teenager need every single night?
What are the risk factors for a stroke in men?
How do doctors treat a broken arm in small children?
When should I see someone about a cough that stays?
What foods should people with kidney disease try to avoid?
Are there exercises against lower back pain during the day?""".splitlines()


def token_prompts(folder: Path, texts: list[str]) -> Tensor:
    """All texts as ids (20, length), cut to the length of the shortest."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    length = min(10, *map(len, rows))
    return torch.tensor([row[:length] for row in rows])


def story_case(name: str, adapter: Path) -> Case:
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(NO_SHARED)
    base = endless(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    # A random adapter that changes half of the tokens at their places makes the model babble, and its tokens close
    # calls. With a fifth of them changed it still tells stories, other ones.
    return draw_case(base, adapter, lora, token_prompts(folder, STORIES), NEW_TOKENS, share=0.2)


def embedded_case() -> Case:
    base_folder, adapter = EMBEDDED / "base", EMBEDDED / "clinic"
    if not (base_folder / "config.json").is_file() or not (adapter / "adapter_config.json").is_file():
        pytest.skip("the embedded base model and its clinic adapter are not part of this checkout yet")
    base, copied = (
        endless(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()) for _ in range(2)
    )
    peft = PeftModel.from_pretrained(copied, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    questions, (end,) = (
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        for texts in ([f"Question: {question}" for question in QUESTIONS], ["\nAnswer:"])
    )
    length = min(map(len, questions))
    prompts = torch.tensor([[tokenizer.bos_token_id, *question[:length], *end] for question in questions])
    return made_case(base, peft, adapter, prompts, NEW_TOKENS)


@pytest.fixture(scope="module", params=["stories260K", "stories3M", "embedded"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name: str = request.param
    case = embedded_case() if name == "embedded" else story_case(name, tmp_path_factory.mktemp(name))
    with served_by_both({"a": case}) as served:
        yield served


def test_logits_are_pefts(trained: Served, engine: str, record_property: Record) -> None:
    case = trained.case
    with trained.connected(engine) as model:
        logits(model, case.sequences[:1, :8])  # learns which modules share a query
        verdict = case.judge(logits(model, case.sequences))
    report(record_property, "logits", verdict)
    verdict.check(TRAINED_LIMIT)
    report(record_property, "tokens that the base would choose otherwise", f"{case.changed:.1%}")


def test_greedy_text_is_pefts_for_20_prompts(trained: Served, engine: str, record_property: Record) -> None:
    case = trained.case
    assert (len(case.prompts), case.new_tokens) == (20, NEW_TOKENS)
    with trained.connected(engine) as model:
        got = greedy(model, case.prompts, NEW_TOKENS)
    report(record_property, "identical prompts", same_greedy(case, got))
