"""``fixed_length``: what the server sees of a generation does not depend on the text, and the text does not change."""

import _thread
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria

from abuse.support import ADAPTER, attention_adapter, clear_error, tiny_llama
from splitveil import connect, disconnect
from splitveil.errors import BudgetExceededError, ConfigurationError, NonFiniteError, SplitveilError
from splitveil.serving.fixed_length import FixedLength
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server
from splitveil.wire import codec

PROMPT = torch.tensor([[5, 9, 23, 41]])
BATCH = torch.tensor([[5, 9, 23, 41], [0, 0, 7, 12], [0, 33, 2, 50]])
STEPS = 12

Seen = list[tuple[tuple[int, ...], int, int]]


class Watch:
    """What the server sees: layers, rows and size of every query; and a gate that can refuse from some query on."""

    def __init__(self) -> None:
        self.seen: Seen = []
        self.refuse_after: int | None = None
        self.at: dict[int, Any] = {}

    def __call__(self, _: str, query: codec.Query) -> None:
        self.seen.append((query.layers, query.rows, len(query.data)))
        act = self.at.pop(len(self.seen), None)
        if act is not None:
            act()

    def require_rows_left(self, identity: str, adapter: str) -> None:
        """Leaves refusing to ``reserve_all``."""

    def reserve_all(self, identity: str, adapter: str, modules: Sequence[str], rows: int) -> None:
        if self.refuse_after is not None and len(self.seen) > self.refuse_after:
            raise BudgetExceededError("the budget is used up")

    def during(self, work: Any) -> tuple[Any, Seen]:
        """What ``work`` returns or raises, and what the server saw meanwhile."""
        self.seen.clear()
        try:
            result = work()
        except (SplitveilError, RuntimeError, ValueError) as error:
            result = error
        return result, list(self.seen)


@pytest.fixture(scope="module")
def adapter() -> ServedAdapter:
    return attention_adapter()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def server(adapter: ServedAdapter, watch: Watch) -> Iterator[Server]:
    with Server({ADAPTER: adapter}, "127.0.0.1:0", on_query=watch, gate=watch) as running:
        yield running


def connected(server: Server, *, fixed_length: bool) -> PreTrainedModel:
    """A connected model that knows its sites."""
    model = connect(tiny_llama(), server.address, ADAPTER, fixed_length=fixed_length, allow_insecure=True)
    with torch.no_grad():
        model(PROMPT)
    return model


@pytest.fixture
def plain(server: Server) -> Iterator[PreTrainedModel]:
    yield (model := connected(server, fixed_length=False))
    disconnect(model)


@pytest.fixture
def fixed(server: Server) -> Iterator[PreTrainedModel]:
    yield (model := connected(server, fixed_length=True))
    disconnect(model)


def generate(model: nn.Module, prompt: Tensor = PROMPT, **more: Any) -> Tensor:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "attention_mask": (prompt != 0).long(), "pad_token_id": 0}
    result: Tensor = model.generate(prompt, **(settings | more))
    return result


def an_end(model: PreTrainedModel, prompt: Tensor, at: int) -> int:
    """A token that the first row's continuation has at step ``at``, and not before."""
    text = generate(model, prompt)[0, prompt.shape[1] :].tolist()
    assert text.index(text[at]) == at
    return int(text[at])


@pytest.mark.parametrize("at", [0, 3, 8])
def test_the_server_sees_the_same_wherever_the_text_ends(
    plain: PreTrainedModel, fixed: PreTrainedModel, watch: Watch, at: int
) -> None:
    end = an_end(plain, PROMPT, at)
    _, endless = watch.during(lambda: generate(fixed))
    text, ended = watch.during(lambda: generate(fixed, eos_token_id=end))
    assert ended == endless
    assert len(ended) == 2 * STEPS
    without, seen = watch.during(lambda: generate(plain, eos_token_id=end))
    assert torch.equal(text, without)
    assert text.shape[1] == PROMPT.shape[1] + at + 1
    # Without the protection the number of messages is the number of tokens.
    assert len(seen) == 2 * (at + 1)


class Texts:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, tokens: Tensor) -> None:
        self.given.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


class After(StoppingCriteria):
    """A user's own criterion, which stops every row after so many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token_id": list(range(20, 40))},
        {"eos_token_id": list(range(20, 40)), "min_new_tokens": 6},
        {"stopping_criteria": [After(9)]},
        {"do_sample": True, "temperature": 1.5, "eos_token_id": list(range(20, 30))},
        {"eos_token_id": list(range(64)), "pad_token_id": 3},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 9, "eos_token_id": list(range(30, 40))},
    ],
)
@pytest.mark.parametrize("prompt", [PROMPT, BATCH], ids=["one", "batch"])
def test_the_text_is_the_same_as_without(
    plain: PreTrainedModel, fixed: PreTrainedModel, settings: dict[str, Any], prompt: Tensor
) -> None:
    texts = []
    for model in (plain, fixed):
        for ids in ({}, {"input_ids": prompt}):
            torch.manual_seed(3)
            arguments = (prompt,) if not ids else ()
            common = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
            common["attention_mask"] = (prompt != 0).long()
            texts.append(model.generate(*arguments, **(common | ids | settings)))
    for text in texts[1:]:
        assert torch.equal(text, texts[0])


def test_a_streamer_gets_the_answer_and_nothing_after_it(plain: PreTrainedModel, fixed: PreTrainedModel) -> None:
    end = an_end(plain, PROMPT, 3)
    expected, got = Texts(), Texts()
    generate(plain, streamer=expected, eos_token_id=end)
    generate(fixed, streamer=got, eos_token_id=end)
    assert (got.given, got.ended) == (expected.given, 1)


def test_a_streamer_takes_no_time_during_the_schedule(fixed: PreTrainedModel, watch: Watch) -> None:
    """Showing a token takes time, and after the end there is none to be shown: the pauses would tell."""
    calls: list[int] = []

    class Slow(Texts):
        def put(self, tokens: Tensor) -> None:
            calls.append(len(watch.seen))

    watch.seen.clear()
    generate(fixed, streamer=Slow())
    assert calls == [2 * STEPS] * (STEPS + 1)


def test_rows_stay_the_same_where_a_prompt_has_several_answers(fixed: PreTrainedModel, watch: Watch) -> None:
    def broken(batch: int, ids: Tensor) -> list[int]:
        if ids.shape[0] == 8:
            raise ValueError("the caller's own")
        return list(range(64))

    several = {"do_sample": True, "num_return_sequences": 3}
    _, usual = watch.during(lambda: generate(fixed, **several))
    error, seen = watch.during(lambda: generate(fixed, prefix_allowed_tokens_fn=broken, **several))
    assert isinstance(error, ValueError)
    assert seen == usual


@pytest.mark.parametrize("after", [1, 2, 7, 2 * STEPS - 1])
def test_a_refusal_is_reported_after_the_schedule(
    plain: PreTrainedModel, fixed: PreTrainedModel, watch: Watch, after: int
) -> None:
    _, usual = watch.during(lambda: generate(fixed))
    watch.refuse_after = after
    shown = Texts()
    error, seen = watch.during(lambda: generate(fixed, streamer=shown))
    assert isinstance(error, BudgetExceededError)
    assert seen == usual
    assert len(shown.given) == 1 + after // 2  # the prompt, and a token for each step that was answered
    error, seen = watch.during(lambda: generate(plain))
    assert isinstance(error, BudgetExceededError)
    assert len(seen) <= after + 2  # of this pass and, in flight, of the next block
    watch.refuse_after = None
    assert torch.equal(generate(fixed), generate(plain))


def test_numbers_that_are_not_finite_are_reported_after_the_schedule(fixed: PreTrainedModel, watch: Watch) -> None:
    """Also where sampling cannot go on: the missing steps are taken without it."""
    expected, usual = watch.during(lambda: generate(fixed))
    weight = fixed.model.embed_tokens.weight.data
    good = weight.clone()
    weight[int(expected[0, 6])] = float("nan")
    for sampling in ({}, {"do_sample": True, "top_k": 1}):
        error, seen = watch.during(lambda sampling=sampling: generate(fixed, **sampling))
        assert isinstance(error, NonFiniteError | RuntimeError)
        assert seen == usual
    weight.copy_(good)
    assert torch.equal(generate(fixed), expected)


def test_an_error_of_the_callers_own_code_does_not_show(fixed: PreTrainedModel, watch: Watch) -> None:
    def broken(batch: int, ids: Tensor) -> list[int]:
        if ids.shape[0] == 7:
            raise ValueError("the caller's own")
        return list(range(64))

    _, usual = watch.during(lambda: generate(fixed))
    error, seen = watch.during(lambda: generate(fixed, prefix_allowed_tokens_fn=broken))
    assert isinstance(error, ValueError)
    assert seen == usual


def test_an_interrupt_is_obeyed_after_the_schedule(fixed: PreTrainedModel, watch: Watch) -> None:
    expected, usual = watch.during(lambda: generate(fixed))
    watch.seen.clear()
    watch.at[5] = _thread.interrupt_main
    with pytest.raises(KeyboardInterrupt):
        generate(fixed)
    # The pass that was interrupted may be cut short: one query of it may be missing.
    assert len(watch.seen) in (len(usual), len(usual) - 1)
    assert torch.equal(generate(fixed), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 2}, "not by beam search"),
        ({"return_dict_in_generate": True}, "token ids only"),
        ({"assistant_model": SimpleNamespace()}, "without assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "not by assisted generation"),
        ({"prefill_chunk_size": 2}, "one pass"),
    ],
)
def test_what_has_no_schedule_is_refused_before_anything_is_sent(
    fixed: PreTrainedModel, watch: Watch, settings: dict[str, Any], words: str
) -> None:
    watch.seen.clear()
    with clear_error(ConfigurationError, match=words):
        generate(fixed, **settings)
    assert watch.seen == []
    generate(fixed)


def test_disconnecting_gives_generate_back(server: Server) -> None:
    model = tiny_llama()
    before = model.generate
    connect(model, server.address, ADAPTER, fixed_length=True, allow_insecure=True)
    assert model.generate != before
    disconnect(model)
    assert model.generate == before
    assert "_get_stopping_criteria" not in vars(model)


def test_a_model_that_does_not_generate_is_refused() -> None:
    with clear_error(ConfigurationError, match="fixed_length needs a model that generates"):
        FixedLength(nn.Linear(2, 2), lambda failures: None)
