"""The folder of a run on the device: what it keeps besides checkpoints, and what is not gone on with by mistake."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from equivalence.support import random_model, tiny_llama
from splitlearning_support import go_on, random_windows, sides
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.defences.permute import Permutation
from splitveil.errors import ConfigurationError, DataError, NonFiniteError, ProtocolError, RefusedError
from splitveil.split.folders import check_writable, clear_unfinished, held, whole_folder
from splitveil.split.personal import step_of
from splitveil.splitlearning import run as run_module
from splitveil.splitlearning.checkpoint import Checkpoints
from splitveil.splitlearning.cloud import LocalCloud, trained_cloud
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.generation import Sampling, generate
from splitveil.splitlearning.halves import fingerprint
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.run import Server, open_for_use, read_run, train_remotely
from splitveil.splitlearning.server import SplitServer
from splitveil.splitlearning.training import DeviceRun, Progress, train

PLAN = Plan(1, Shape.U, Trains.LORA, Trains.LORA, rank=2)
COURSE = Course(6, rate=1e-2, batch=2, save_every=2, seed=4)


class StoppedError(Exception):
    """What ends a run in the middle of the tests."""


class Words:
    """Stands in for a tokenizer."""

    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) % 90 for letter in text]}


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(tiny_llama(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def windows(base: PreTrainedModel) -> Tensor:
    return random_windows(base, 9, 8)


# -- interrupted, and gone on with -------------------------------------------------------------------------------------


def test_the_personal_part_is_that_of_the_last_step(
    base: PreTrainedModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program ended between the last checkpoint and the personal part that belongs to it."""
    device, cloud = sides(base, PLAN, tmp_path / "cloud")
    write = device.save_personal

    def stop(folder: Path, step: int) -> Any:
        if step == COURSE.steps:
            raise StoppedError
        return write(folder, step)

    monkeypatch.setattr(device, "save_personal", stop)
    with pytest.raises(StoppedError):
        train(device, cloud, windows, None, COURSE, tmp_path / "device")
    assert step_of(tmp_path / "device" / "personal") == 4
    outcome, _ = go_on(base, PLAN, windows, COURSE, tmp_path)
    assert (outcome.resumed, outcome.step) == (6, 6)
    _, whole = go_on(base, PLAN, windows, COURSE, tmp_path / "whole")
    assert step_of(tmp_path / "device" / "personal") == 6
    mine, expected = (
        (place / "device" / "personal" / "adapter_model.safetensors").read_bytes()
        for place in (tmp_path, tmp_path / "whole")
    )
    assert mine == expected
    assert whole


def test_however_often_saving_fails_both_sides_have_a_step_in_common(
    base: PreTrainedModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [5, 7, 9]
    go_on(base, PLAN, windows, replace(COURSE, steps=4), tmp_path)
    write = Checkpoints.write
    for last in steps:
        device, cloud = sides(base, PLAN, tmp_path / "cloud")
        start = cloud.resume(DeviceRun(tmp_path / "device").steps())
        assert start == 4

        def refuse(self: Checkpoints, *how: Any) -> None:
            if self.folder.name == "checkpoints":
                raise DataError("the device's disk is full")
            write(self, *how)

        monkeypatch.setattr(Checkpoints, "write", refuse)
        with pytest.raises(DataError, match="disk is full"):
            train(
                device, cloud, windows, None, replace(COURSE, steps=last, save_every=100), tmp_path / "device", start=4
            )
        monkeypatch.setattr(Checkpoints, "write", write)
    assert LocalCloud(base, cut=1, shape=Shape.U, plan=PLAN, folder=tmp_path / "cloud").steps() == (4, 9)


def test_a_permutation_without_its_key_is_not_gone_on_with(
    base: PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    """Upper blocks that learnt from one order understand no other."""
    key = bytes(range(32))

    def half_way(defence: Permutation, steps: int) -> Any:
        device, cloud = sides(base, PLAN, tmp_path / "cloud", defence=defence)
        start = cloud.resume(DeviceRun(tmp_path / "device").steps())
        return train(device, cloud, windows, None, replace(COURSE, steps=steps), tmp_path / "device", start=start)

    half_way(Permutation(key=key), 4)
    with pytest.raises(DataError, match="defence"):
        half_way(Permutation(), 6)
    assert half_way(Permutation(key=key), 6).resumed == 4


def test_the_halves_of_two_runs_are_not_put_together(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    for name, text in (("a", windows), ("b", windows.flip(0))):
        device, cloud = sides(base, PLAN, tmp_path / name / "cloud")
        train(device, cloud, text, None, replace(COURSE, steps=4), tmp_path / name / "device", run=name)
    shutil.copytree(tmp_path / "b" / "cloud", tmp_path / "a" / "cloud", dirs_exist_ok=True)
    device, cloud = sides(base, PLAN, tmp_path / "a" / "cloud")
    start = cloud.resume(DeviceRun(tmp_path / "a" / "device").steps())
    with pytest.raises(DataError, match="another token"):
        train(device, cloud, windows, None, COURSE, tmp_path / "a" / "device", start=start, run="b")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_between_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    target, rename = tmp_path / "folder", Path.rename
    with whole_folder(target) as made:
        (made / "a").write_text("1")

    def interrupted(path: Path, to: Path) -> Path:
        if to == target and not path.name.endswith(".old"):
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error), whole_folder(target) as made:
        (made / "a").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "a").read_text() == "1"


def test_what_was_about_to_be_replaced_gets_its_name_back(tmp_path: Path) -> None:
    """The power went between the two renames."""
    for name in (".folder.0123456789abcdef.old", ".folder.fedcba9876543210", ".other.0123456789abcdef.old", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    clear_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "other"]
    assert (tmp_path / "folder" / "a").read_text() == ".folder.0123456789abcdef.old"
    assert (tmp_path / "other" / "a").read_text() == "other"


@pytest.mark.parametrize("place", ["begin", "between"])
def test_losses_on_a_full_disk(
    base: PreTrainedModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    go_on(base, PLAN, windows, replace(COURSE, steps=2), tmp_path)
    losses = tmp_path / "device" / "losses.jsonl"
    losses.write_bytes(losses.read_bytes() + b"\xff torn\n")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    def watch(progress: Progress) -> None:
        if progress.step == 3:
            monkeypatch.setattr(Path, "open", full)

    device, cloud = sides(base, PLAN, tmp_path / "cloud")
    start = cloud.resume(DeviceRun(tmp_path / "device").steps())
    if place == "begin":
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"losses.jsonl: No space left on device; checkpoints are as they were"):
        train(device, cloud, windows, None, COURSE, tmp_path / "device", start=start, watch=watch)
    monkeypatch.undo()
    assert not losses.with_suffix(".new").exists()
    assert DeviceRun(tmp_path / "device").steps() == (2,)
    assert go_on(base, PLAN, windows, COURSE, tmp_path)[0].resumed == 2


def test_a_folder_that_cannot_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> Any:
        raise PermissionError(13, "Permission denied", "/somebody's/folder")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match="the checkpoints of this run cannot be looked at: Permission denied") as raised:
        Checkpoints(tmp_path, "this run").steps()
    assert "somebody" not in str(raised.value)


# -- over a network ----------------------------------------------------------------------------------------------------


TEXTS = ["the cat sat on the mat and ran to my house in cold rain " * 3]


def trained(base: PreTrainedModel, server: SplitServer, folder: Path, plan: Plan = PLAN, **changes: Any) -> Any:
    course = replace(COURSE, steps=changes.pop("steps", 4))
    where = Server(server.address)
    return train_remotely(base, Words(), TEXTS, where, folder, plan, course, window=8, **changes)[0]


@pytest.fixture
def server(base: PreTrainedModel, tmp_path: Path) -> Any:
    with SplitServer(base, cut=1, state=tmp_path / "state", trains=frozenset(Trains), listen="127.0.0.1:0") as running:
        yield running


def said(base: PreTrainedModel, server: SplitServer, folder: Path, **how: Any) -> tuple[list[int], int]:
    """(greedy tokens, bytes sent) with what a run made."""
    device, cloud = open_for_use(base, Server(server.address), read_run(folder), **how)
    try:
        found = generate(device, cloud, torch.tensor([[5, 6, 7]]), max_new_tokens=6)
    finally:
        cloud.close()
    return found[0].tolist(), cloud.traffic.sent


def test_a_permutations_order_is_kept_with_the_run(base: PreTrainedModel, server: SplitServer, tmp_path: Path) -> None:
    trained(base, server, tmp_path / "mine", defence="permutation")
    key = tmp_path / "mine" / "defence.key"
    assert key.stat().st_mode & 0o077 == 0
    assert trained(base, server, tmp_path / "mine", defence="permutation", steps=6).resumed == 4
    first = said(base, server, tmp_path / "mine")
    assert first == said(base, server, tmp_path / "mine")
    key.write_text("00" * 32)
    assert said(base, server, tmp_path / "mine") != first
    with pytest.raises(DataError, match="defence"):
        trained(base, server, tmp_path / "mine", defence="permutation", steps=8)
    key.write_text("short")
    with pytest.raises(DataError, match="the order that this run learnt in"):
        read_run(tmp_path / "mine")


def test_what_a_run_was_trained_with_is_used_again(base: PreTrainedModel, server: SplitServer, tmp_path: Path) -> None:
    trained(base, server, tmp_path / "mine", defence="int8")
    assert read_run(tmp_path / "mine").defence == "int8"
    defended = said(base, server, tmp_path / "mine")[1]
    assert defended == said(base, server, tmp_path / "mine", defence="int8")[1]
    assert defended < said(base, server, tmp_path / "mine", defence="none")[1]


def test_the_clouds_part_is_of_the_personal_parts_step(
    base: PreTrainedModel, server: SplitServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoints.write

    def stop(self: Checkpoints, facts: Any, *how: Any) -> None:
        if self.folder.name == "checkpoints" and facts.step == 4:
            raise StoppedError
        write(self, facts, *how)

    monkeypatch.setattr(Checkpoints, "write", stop)
    with pytest.raises(StoppedError):
        trained(base, server, tmp_path / "mine")
    monkeypatch.undo()
    told = read_run(tmp_path / "mine")
    assert told.step == 2
    (folder,) = [path for path in (tmp_path / "state").iterdir() if path.is_dir()]
    assert Checkpoints(folder).steps() == (2, 4)
    used = said(base, server, tmp_path / "mine")
    shutil.rmtree(folder / "step-000004")
    assert said(base, server, tmp_path / "mine") == used
    shutil.rmtree(folder / "step-000002")
    (tmp_path / "other").mkdir()
    with pytest.raises(RefusedError, match="no trained weights of this run here"):
        said(base, server, tmp_path / "mine")
    go_on(base, PLAN, random_windows(base, 9, 8), replace(COURSE, steps=2), tmp_path / "local")
    with pytest.raises(RefusedError, match="of step 3, which the device has, but of 2"):
        trained_cloud(base, tmp_path / "local" / "cloud", cut=1, shape=Shape.U, steps=(3,))


def test_without_its_personal_part_a_run_is_not_taken_for_the_base(
    base: PreTrainedModel, server: SplitServer, tmp_path: Path
) -> None:
    trained(base, server, tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "personal")
    with pytest.raises(DataError, match="personal is missing, and the run trained this side"):
        read_run(tmp_path / "mine")
    trained(base, server, tmp_path / "mine")
    assert read_run(tmp_path / "mine").personal == tmp_path / "mine" / "personal"
    trained(base, server, tmp_path / "nothing", replace(PLAN, device=Trains.NOTHING))
    assert read_run(tmp_path / "nothing").personal is None
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "mine" / "run.json", tmp_path / "empty")
    with pytest.raises(DataError, match="has not come to a checkpoint"):
        read_run(tmp_path / "empty")


def test_a_refused_beginning_may_be_put_right(base: PreTrainedModel, server: SplitServer, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="give --cut 1"):
        trained(base, server, tmp_path / "mine", replace(PLAN, cut=2))
    assert trained(base, server, tmp_path / "mine").step == 4
    with pytest.raises(ConfigurationError, match="a run of another plan"):
        trained(base, server, tmp_path / "mine", replace(PLAN, cut=2))


def test_a_folder_in_which_another_program_trains(base: PreTrainedModel, server: SplitServer, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine") as ours:
        assert ours
        with pytest.raises(ConfigurationError, match="another `split train` is writing to"):
            trained(base, server, tmp_path / "mine")
    assert trained(base, server, tmp_path / "mine").step == 4


def test_checkpoints_without_their_run_are_left_alone(
    base: PreTrainedModel, server: SplitServer, tmp_path: Path
) -> None:
    trained(base, server, tmp_path / "mine")
    token = (tmp_path / "mine" / "token").read_text()
    (tmp_path / "mine" / "run.json").unlink()
    with pytest.raises(DataError, match=r"holds checkpoints and no run\.json"):
        trained(base, server, tmp_path / "mine")
    assert (tmp_path / "mine" / "token").read_text() == token


def test_another_runs_token_is_noticed(base: PreTrainedModel, server: SplitServer, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        trained(base, server, tmp_path / name)
    shutil.copy(tmp_path / "other" / "token", tmp_path / "mine" / "token")
    with pytest.raises(DataError, match="another token"):
        trained(base, server, tmp_path / "mine", steps=6)


def test_a_server_that_cannot_keep_anything_says_so_at_once(
    base: PreTrainedModel, server: SplitServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(30, "Read-only file system", "/the/operators/folder")

    monkeypatch.setattr("splitveil.splitlearning.service.check_writable", full)
    with pytest.raises(RefusedError, match="cannot keep checkpoints at the moment: Read-only file system") as raised:
        trained(base, server, tmp_path / "mine")
    assert "operators" not in str(raised.value)


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        check_writable(tmp_path / "file")


def test_a_run_of_an_earlier_version_is_gone_on_with(
    base: PreTrainedModel, server: SplitServer, tmp_path: Path
) -> None:
    """It says neither its defence nor, in its checkpoints, which run it is."""
    place = tmp_path / "mine"
    trained(base, server, place)
    told = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps({"format": told["format"], "plan": told["plan"]}))
    checkpoints = DeviceRun(place).checkpoints
    for kept in [checkpoints.read(step) for step in checkpoints.steps()]:
        checkpoints.write(replace(kept.facts, run=""), kept.tensors, 2)
    assert read_run(place).defence == "none"
    assert trained(base, server, place, steps=6).resumed == 4


# -- what a cloud answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["learn", "evaluate", "generate"])
def test_an_answer_of_another_dtype(base: PreTrainedModel, windows: Tensor, call: str) -> None:
    device, cloud = sides(base, PLAN)

    class Rounding:
        def __getattr__(self, name: str) -> Any:
            def called(*how: Any) -> Any:
                found = getattr(cloud, name)(*how)
                if isinstance(found, tuple):
                    return found[0].bfloat16(), found[1]
                return found.bfloat16() if isinstance(found, Tensor) else found

            return called

    other: Any = Rounding()
    tokens, labels = windows[:2], windows[:2]
    calls = {
        "learn": lambda: device.learn(other, tokens, labels, 16.0),
        "evaluate": lambda: device.evaluate(other, tokens, labels),
        "generate": lambda: generate(device, other, tokens, max_new_tokens=2),
    }
    with pytest.raises(ProtocolError, match=r"of torch\.bfloat16, expected .* of torch\.float32"):
        calls[call]()


def test_models_that_compute_otherwise_are_other_models() -> None:
    prints = {
        fingerprint(random_model(tiny_llama(**how))) for how in ({}, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"})
    }
    assert len(prints) == 3
    same = random_model(tiny_llama())
    same.config.use_cache, same.config._name_or_path = False, "elsewhere"
    assert fingerprint(same) in prints


def test_temperatures_and_seeds_at_the_edges(base: PreTrainedModel) -> None:
    device, cloud = sides(base, replace(PLAN, device=Trains.NOTHING))
    tokens = torch.tensor([[5, 6, 7]])
    likeliest = generate(device, cloud, tokens, max_new_tokens=4)
    for temperature in (1e-44, 1e-30):
        drawn = generate(device, cloud, tokens, max_new_tokens=4, sampling=Sampling(temperature, seed=1))
        assert torch.equal(drawn, likeliest)
    for seed in (-1, 2**63):
        with pytest.raises(ConfigurationError, match="a seed is a whole number"):
            Sampling(1.0, seed=seed)


def test_logits_that_no_token_can_be_drawn_from(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    device, cloud = sides(base, replace(PLAN, device=Trains.NOTHING))
    tokens = torch.tensor([[5, 6, 7]])
    monkeypatch.setattr(Device, "next_logits", lambda *_: torch.full((1, 160), 3e38))
    assert generate(device, cloud, tokens, max_new_tokens=1, sampling=Sampling(0.5, seed=1)).shape == (1, 4)
    monkeypatch.setattr(Device, "next_logits", lambda *_: torch.full((1, 160), torch.nan))
    with pytest.raises(NonFiniteError, match="no token can be drawn"):
        generate(device, cloud, tokens, max_new_tokens=1, sampling=Sampling(0.5, seed=1))


def test_the_module_names_its_files() -> None:
    """What people back up by name."""
    assert (run_module.RUN, run_module.TOKEN, run_module.KEY) == ("run.json", "token", "defence.key")
