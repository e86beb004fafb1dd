"""Split runs in one process, and the ordinary training loop over the whole model that they are compared with."""

import copy
import importlib.resources
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.data import rows_of_step
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.loss import next_tokens
from splitveil.splitlearning.training import DeviceRun, Outcome, Progress, train

EMBEDDED = Path(str(importlib.resources.files("splitveil"))) / "embedded" / "base"


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, for tests whose matrices are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_windows(model: PreTrainedModel, count: int, length: int, seed: int = 1) -> Tensor:
    """(count, length) token ids with a pattern that can be learnt: every other token is the same."""
    draw = torch.Generator().manual_seed(seed)
    windows = torch.randint(2, model.config.vocab_size, (count, length), generator=draw)
    windows[:, ::2] = 7
    return windows


@dataclass
class Run:
    """What a run of training came to: the loss of every step, and what was trained, by name."""

    losses: list[float]
    weights: dict[str, Tensor] = field(repr=False)

    def distance(self, other: "Run") -> tuple[float, float]:
        """(largest relative difference of a step's loss, largest absolute difference of a weight)."""
        assert self.weights.keys() == other.weights.keys()
        assert len(self.losses) == len(other.losses) > 0
        loss = max(abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses, strict=True))
        weight = max((self.weights[name] - other.weights[name]).abs().max().item() for name in self.weights)
        return loss, weight


def sides(base: PreTrainedModel, plan: Plan, folder: Path | None = None, **device: object) -> tuple[Device, LocalCloud]:
    """A new device and a new cloud for ``plan``."""
    where = {"cut": plan.cut, "shape": plan.shape, "plan": plan}
    return Device(base, **where, **device), LocalCloud(base, **where, folder=folder)


def own_weights(device: Device, cloud: LocalCloud) -> dict[str, Tensor]:
    """Copies of what both sides train."""
    both = {**device.own.parameters, **cloud._own.parameters}
    assert len(both) == len(device.own.parameters) + len(cloud._own.parameters)
    return {name: parameter.detach().clone() for name, parameter in both.items()}


def split_steps(base: PreTrainedModel, plan: Plan, windows: Tensor, course: Course, **device: object) -> Run:
    """The steps of a run alone: no checkpoints, nothing on the disk."""
    here, there = sides(base, plan, **device)
    size, losses = course.batch * course.accumulation, []
    for step in range(course.steps):
        rows = windows[rows_of_step(len(windows), step, size, course.seed)]
        normaliser = float(size * (rows.shape[1] - 1))
        losses.append(sum(here.learn(there, t, next_tokens(t), normaliser) for t in rows.split(course.batch)))
        there.step(course.rate_of(step))
        here.step(course.rate_of(step))
    return Run(losses, own_weights(here, there))


def split_run(
    base: PreTrainedModel, plan: Plan, windows: Tensor, course: Course, folder: Path, **device: object
) -> Run:
    """A run through the product's own training loop."""
    here, there = sides(base, plan, folder / "cloud", **device)
    losses: list[float] = []

    def watch(progress: Progress) -> None:
        if progress.step:
            losses.append(progress.loss)

    train(here, there, windows, None, course, folder / "device", watch=watch)
    return Run(losses, own_weights(here, there))


def go_on(
    base: PreTrainedModel, plan: Plan, windows: Tensor, course: Course, folder: Path
) -> tuple[Outcome, dict[str, Tensor]]:
    """Begins or resumes the run in ``folder``, with new sides, as after a restart of both programs."""
    here, there = sides(base, plan, folder / "cloud")
    start = there.resume(DeviceRun(folder / "device").steps())
    outcome = train(here, there, windows, None, course, folder / "device", start=start)
    return outcome, own_weights(here, there)


def unsplit_run(base: PreTrainedModel, plan: Plan, windows: Tensor, course: Course) -> Run:
    """The same training as an ordinary loop over the whole model; only the order of rows is ``splitlearning``'s."""
    model = copy.deepcopy(base).eval()
    if Trains.LORA in (plan.device, plan.cloud):
        named = [m for name, m in model.named_modules() if name.rpartition(".")[2] in plan.targets]
        lora = LoraConfig(
            r=plan.rank,
            lora_alpha=plan.alpha,
            target_modules=list(plan.targets),
            fan_in_fan_out=isinstance(named[0], Conv1D),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(plan.seed)
        model = get_peft_model(model, lora).get_base_model().eval()
    embeddings = model.get_input_embeddings().weight
    trained = {}
    for name, parameter in model.named_parameters():
        block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        below = block is not None and block < plan.cut
        if block is None:
            outer = plan.device if plan.shape is Shape.U else plan.cloud
            learns = outer is Trains.FULL and not (plan.freeze_embeddings and parameter is embeddings)
        else:
            mode = plan.device if below else plan.cloud
            learns = mode is (Trains.LORA if "lora_" in name else Trains.FULL)
        parameter.requires_grad_(learns)
        if learns:
            trained[name.replace(".base_layer", "")] = parameter
    told = plan.optimiser
    adam = torch.optim.AdamW(
        trained.values(), lr=0.0, betas=(told.beta1, told.beta2), eps=told.epsilon, weight_decay=told.weight_decay
    )
    losses = []
    for step in range(course.steps):
        tokens = windows[rows_of_step(len(windows), step, course.batch * course.accumulation, course.seed)]
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        adam.param_groups[0]["lr"] = course.rate_of(step)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return Run(losses, {name: parameter.detach().clone() for name, parameter in trained.items()})
