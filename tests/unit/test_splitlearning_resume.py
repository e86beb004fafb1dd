"""Interrupted and resumed = uninterrupted, to the last bit; and what happens to damaged checkpoints."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equivalence.support import random_model, tiny_llama
from splitlearning_support import go_on, one_thread, own_weights, random_windows, sides
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.errors import ConnectionFailedError, DataError, NonFiniteError, RefusedError
from splitveil.split.folders import clear_unfinished, whole_folder
from splitveil.split.personal import personalised
from splitveil.splitlearning.checkpoint import FACTS, TENSORS, Checkpoints
from splitveil.splitlearning.cloud import LocalCloud, trained_cloud
from splitveil.splitlearning.course import Course, Decay
from splitveil.splitlearning.interface import Optimiser, Plan, Shape, Trains
from splitveil.splitlearning.training import DeviceRun, Progress, train

LORA, FULL = Trains.LORA, Trains.FULL
PLANS = {
    "u-lora": Plan(1, Shape.U, LORA, LORA, rank=2),
    "u-full": Plan(1, Shape.U, FULL, FULL, optimiser=Optimiser(weight_decay=0.1)),
    "straight-lora": Plan(1, Shape.STRAIGHT, LORA, LORA, rank=2),
    "nothing-to-train-in-the-cloud": Plan(2, Shape.U, LORA, LORA, rank=2),
}
COURSE = Course(
    7, rate=1e-2, batch=2, accumulation=2, warmup=2, decay=Decay.COSINE, save_every=2, evaluate_every=3, seed=4
)
PLAN = PLANS["u-lora"]


class StoppedError(Exception):
    """What ends a run in the middle of the tests."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that was written; a test of its own says what is for a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(tiny_llama(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def windows(base: PreTrainedModel) -> Tensor:
    return random_windows(base, 9, 8)


def stopped_after(
    base: PreTrainedModel, plan: Plan, windows: Tensor, folder: Path, steps: int, course: Course = COURSE
) -> None:
    """A run whose programs ended within the step after ``steps``."""
    device, cloud = sides(base, plan, folder / "cloud")

    def watch(progress: Progress) -> None:
        if progress.step == steps + 1:
            raise StoppedError

    start = cloud.resume(DeviceRun(folder / "device").steps())
    with pytest.raises(StoppedError):
        train(device, cloud, windows, windows[:2], course, folder / "device", start=start, watch=watch)


def lines(folder: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (folder / "device" / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", PLANS)
def test_resumed_is_uninterrupted(base: PreTrainedModel, windows: Tensor, name: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    device, cloud = sides(base, PLANS[name], whole / "cloud")
    begun = own_weights(device, cloud)
    train(device, cloud, windows, windows[:2], COURSE, whole / "device")
    expected = own_weights(device, cloud)
    assert not same(expected, begun)
    for steps in (1, 3, 5):
        stopped_after(base, PLANS[name], windows, parts, steps)
    device, cloud = sides(base, PLANS[name], parts / "cloud")
    start = cloud.resume(DeviceRun(parts / "device").steps())
    assert start == 4
    outcome = train(device, cloud, windows, windows[:2], COURSE, parts / "device", start=start)
    assert (outcome.resumed, outcome.step) == (4, 7)
    assert same(own_weights(device, cloud), expected)
    assert lines(parts) == lines(whole)
    for side in ("device/checkpoints", "cloud"):
        assert sorted(p.name for p in (parts / side).iterdir()) == ["step-000006", "step-000007"]
        for file in ("tensors.safetensors", "facts.json"):
            assert (parts / side / "step-000007" / file).read_bytes() == (
                whole / side / "step-000007" / file
            ).read_bytes()


def test_without_its_optimiser_a_resumed_run_is_another(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    """The comparison above can fail: weights alone are not enough to go on from."""
    whole, weights = go_on(base, PLAN, windows, COURSE, tmp_path / "whole")
    stopped_after(base, PLAN, windows, tmp_path / "parts", 5)
    device, cloud = sides(base, PLAN, tmp_path / "parts" / "cloud")
    start = cloud.resume(DeviceRun(tmp_path / "parts" / "device").steps())
    cloud._own._adam.state.clear()  # type: ignore[union-attr]
    train(device, cloud, windows, None, COURSE, tmp_path / "parts" / "device", start=start)
    assert whole.step == 7
    assert not same(own_weights(device, cloud), weights)


def test_a_run_whose_cloud_is_ahead(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    """The device ended between the cloud's checkpoint and its own: both go back to what both have."""
    _, expected = go_on(base, PLAN, windows, COURSE, tmp_path / "whole")
    folder = tmp_path / "parts"
    device, cloud = sides(base, PLAN, folder / "cloud")
    save = cloud.save

    def save_and_stop(step: int) -> None:
        save(step)
        if step == 4:
            raise StoppedError

    cloud.save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        train(device, cloud, windows, None, COURSE, folder / "device")
    assert LocalCloud(base, cut=1, shape=Shape.U, plan=PLAN, folder=folder / "cloud").steps() == (2, 4)
    assert DeviceRun(folder / "device").steps() == (2,)
    outcome, weights = go_on(base, PLAN, windows, COURSE, folder)
    assert outcome.resumed == 2
    assert same(weights, expected)


def test_a_killed_process_leaves_whole_checkpoints(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    """SIGKILL at whatever moment, again and again, while a checkpoint is made after every step; then to the end."""
    course = replace(COURSE, steps=20, save_every=1)
    kills = 0
    with one_thread():  # a forked process has no other threads to wait for
        _, expected = go_on(base, PLAN, windows, course, tmp_path / "whole")
        for number, delay in enumerate((0.11, 0.19, 0.25, 0.5, 1.0, 2.0, 4.0)):
            # Three times, and more where that left nothing to go on from.
            if number >= 3 and DeviceRun(tmp_path / "parts" / "device").steps():
                break
            child = os.fork()
            if child == 0:
                try:
                    go_on(base, PLAN, windows, course, tmp_path / "parts")
                finally:
                    os._exit(0)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
        outcome, weights = go_on(base, PLAN, windows, course, tmp_path / "parts")
    assert kills > 0
    assert outcome.resumed > 0
    assert not outcome.notes
    assert same(weights, expected)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors gone": lambda p: (p / TENSORS).unlink(),
    "facts gone": lambda p: (p / FACTS).unlink(),
    "tensors torn": lambda p: truncate(p / TENSORS),
    "one bit of a tensor": lambda p: flip(p / TENSORS),
    "tensors empty": lambda p: (p / TENSORS).write_bytes(b""),
    "facts torn": lambda p: truncate(p / FACTS),
    "facts of a list": lambda p: (p / FACTS).write_text("[1]"),
    "facts without a plan": lambda p: (p / FACTS).write_text('{"format": 1, "sha256": ""}'),
    "another seed": lambda p: (p / FACTS).write_text((p / FACTS).read_text().replace('"seed": 0', '"seed": 1')),
}


@pytest.mark.parametrize("side", ["device/checkpoints", "cloud"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    base: PreTrainedModel, windows: Tensor, damage: str, side: str, tmp_path: Path
) -> None:
    _, expected = go_on(base, PLAN, windows, COURSE, tmp_path / "whole")
    folder = tmp_path / "parts"
    stopped_after(base, PLAN, windows, folder, 5)
    DAMAGES[damage](folder / side / "step-000004")
    outcome, weights = go_on(base, PLAN, windows, COURSE, folder)
    assert outcome.resumed == 2
    assert outcome.notes
    assert "step" in outcome.notes[0]
    assert same(weights, expected)


def test_nothing_whole_is_an_error_and_no_new_beginning(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    for side, error in (("device/checkpoints", DataError), ("cloud", RefusedError)):
        folder = tmp_path / side.partition("/")[0]
        stopped_after(base, PLAN, windows, folder, 5)
        for step in (2, 4):
            flip(folder / side / f"step-00000{step}" / TENSORS)
        with pytest.raises(error, match="another folder"):
            go_on(base, PLAN, windows, COURSE, folder)
    folder = tmp_path / "forgotten"
    stopped_after(base, PLAN, windows, folder, 5)
    device, cloud = sides(base, PLAN, tmp_path / "nowhere")
    with pytest.raises(RefusedError, match="none in common"):
        cloud.resume(DeviceRun(folder / "device").steps())
    with pytest.raises(DataError, match="begin at 0"):
        train(device, cloud, windows, None, COURSE, folder / "device")
    with pytest.raises(DataError, match="cannot be read"):
        train(device, cloud, windows, None, COURSE, folder / "device", start=6)


def test_a_run_goes_on_as_what_it_was_only(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    stopped_after(base, PLAN, windows, tmp_path, 5)
    with pytest.raises(DataError, match="learning rate"):
        go_on(base, PLAN, windows, replace(COURSE, rate=2e-2), tmp_path)
    with pytest.raises(DataError, match="text"):
        go_on(base, PLAN, windows[1:], COURSE, tmp_path)
    with pytest.raises(RefusedError, match="another plan"):
        go_on(base, replace(PLAN, seed=1), windows, COURSE, tmp_path)
    other = random_model(base.config, seed=1)
    with pytest.raises(RefusedError, match="another base model"):
        go_on(other, PLAN, windows, COURSE, tmp_path)
    device, _ = sides(other, PLAN)
    _, cloud = sides(base, PLAN, tmp_path / "cloud")
    with pytest.raises(DataError, match="another base model"):
        train(device, cloud, windows, None, COURSE, tmp_path / "device", start=cloud.resume([4]))


def test_a_finished_run_may_be_asked_again_and_for_more(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    constant = replace(COURSE, decay=Decay.CONSTANT)
    first, weights = go_on(base, PLAN, windows, constant, tmp_path)
    again, unchanged = go_on(base, PLAN, windows, constant, tmp_path)
    assert (again.resumed, again.step, again.tokens) == (7, 7, 0)
    assert again.tokens_per_second != again.tokens_per_second  # NaN: nothing was measured
    assert first.tokens == 7 * 4 * 8
    assert same(weights, unchanged)
    longer, weights = go_on(base, PLAN, windows, replace(constant, steps=9), tmp_path)
    assert (longer.resumed, longer.step) == (7, 9)
    _, expected = go_on(base, PLAN, windows, replace(constant, steps=9), tmp_path / "whole")
    assert same(weights, expected)


def test_a_loss_of_nan_leaves_the_checkpoints(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    for name, plan in PLANS.items():
        folder = tmp_path / name
        device, cloud = sides(base, plan, folder / "cloud")

        def watch(progress: Progress, device: object = device) -> None:
            if progress.step == 3:
                parameter = next(iter(device.own.parameters.values()))  # type: ignore[attr-defined]
                with torch.no_grad():
                    parameter.fill_(torch.nan)

        with pytest.raises((NonFiniteError, RefusedError), match=r"in step 4: .*Checkpoints are as they were"):
            train(device, cloud, windows, None, COURSE, folder / "device", watch=watch)
        assert all(bool(p.isfinite().all()) for p in cloud._own.parameters.values())
        assert DeviceRun(folder / "device").steps() == cloud.steps() == (2,)
        outcome, weights = go_on(base, plan, windows, COURSE, folder)
        assert outcome.resumed == 2
        assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_a_peer_that_disappears(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    _, expected = go_on(base, PLAN, windows, COURSE, tmp_path / "whole")
    for call in ("forward", "backward", "step", "save"):
        folder = tmp_path / call
        device, cloud = sides(base, PLAN, folder / "cloud")
        real, count = getattr(cloud, call), [0]

        def vanish(*args: object, real: Callable[..., object] = real, count: list[int] = count) -> object:
            count[0] += 1
            if count[0] == {"forward": 7, "backward": 8, "step": 4, "save": 2}[call]:  # noqa: B023
                raise ConnectionFailedError("the server is gone")
            return real(*args)

        setattr(cloud, call, vanish)
        with pytest.raises(ConnectionFailedError):
            train(device, cloud, windows, None, COURSE, folder / "device")
        outcome, weights = go_on(base, PLAN, windows, COURSE, folder)
        assert outcome.resumed == 2
        assert same(weights, expected)


def test_a_cloud_with_trained_weights(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no trained weights"):
        trained_cloud(base, tmp_path / "cloud", cut=1, shape=Shape.U)
    device, cloud = sides(base, PLAN, tmp_path / "cloud")
    outcome = train(device, cloud, windows, windows[:2], COURSE, tmp_path / "device")
    assert outcome.personal is not None
    again = trained_cloud(base, tmp_path / "cloud", cut=1, shape=Shape.U)
    mine = sides(personalised(base, outcome.personal), replace(PLAN, device=Trains.NOTHING))[0]
    crossing = mine.crossing(windows[:2])
    assert torch.equal(crossing.hidden, device.crossing(windows[:2]).hidden)
    got, expected = again.evaluate(crossing, None)[0], cloud.evaluate(crossing, None)[0]
    assert got is not None
    assert expected is not None
    assert torch.equal(got, expected)
    with pytest.raises(RefusedError, match="not at 2"):
        trained_cloud(base, tmp_path / "cloud", cut=2, shape=Shape.U)


def test_folders_are_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with whole_folder(target) as made:
        (made / "a").write_text("1")
        assert not target.exists()

    def interrupted() -> None:
        with whole_folder(target) as made:
            (made / "a").write_text("2")
            raise StoppedError

    with pytest.raises(StoppedError):
        interrupted()
    assert (target / "a").read_text() == "1"
    with whole_folder(target) as made:
        (made / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in target.parent.iterdir()] == ["folder"]
    (target.parent / ".folder.0123456789abcdef").mkdir()
    (target.parent / ".kept.txt").mkdir()
    clear_unfinished(target.parent)
    assert sorted(p.name for p in target.parent.iterdir()) == [".kept.txt", "folder"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append(Path(f"/proc/self/fd/{handle}").readlink().name))
    monkeypatch.setattr(Path, "rename", lambda path, to: happened.append("rename") or rename(path, to))
    with whole_folder(tmp_path / "folder") as made:
        (made / "a").write_text("1")
        (made / "b").write_text("2")
    assert sorted(happened[:2]) == ["a", "b"]
    assert happened[2].startswith(".folder.")
    assert happened[3:] == ["rename", tmp_path.name]


def test_a_disk_that_refuses(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    device, cloud = sides(base, PLAN, tmp_path / "cloud")
    (tmp_path / "cloud").write_text("a file where the folder should be")
    with pytest.raises(RefusedError, match="cannot be written"):
        train(device, cloud, windows, None, COURSE, tmp_path / "device")
    assert Checkpoints(tmp_path / "cloud").steps() == ()
    assert DeviceRun(tmp_path / "device").steps() == ()
