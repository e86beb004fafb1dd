"""Folders of checkpoints: what stands in them, who may read them, and what is taken for one."""

from pathlib import Path

import pytest
import torch
from equivalence.support import random_model, tiny_llama
from splitlearning_support import random_windows, sides
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.errors import RefusedError
from splitveil.split.folders import whole_folder
from splitveil.splitlearning.checkpoint import FACTS, Checkpoints
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.training import train

PLAN = Plan(1, Shape.U, Trains.LORA, Trains.LORA, rank=2)
COURSE = Course(7, rate=1e-2, batch=2, save_every=2)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(tiny_llama(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def windows(base: PreTrainedModel) -> Tensor:
    return random_windows(base, 9, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_whole_checkpoint_of_nan_is_not_gone_on_with(
    base: PreTrainedModel, windows: Tensor, tmp_path: Path, value: float
) -> None:
    """Its digest is right; whoever may write there made it so."""
    device, cloud = sides(base, PLAN, tmp_path / "cloud")
    train(device, cloud, windows, None, COURSE, tmp_path / "device")
    checkpoints = Checkpoints(tmp_path / "cloud")
    kept = checkpoints.read(7)
    name = next(name for name in kept.tensors if name.startswith("exp_avg_sq."))
    checkpoints.write(kept.facts, kept.tensors | {name: kept.tensors[name] * value}, 6)
    fresh = sides(base, PLAN, tmp_path / "cloud")[1]
    before = {key: tensor.clone() for key, tensor in fresh._own.state().items()}
    with pytest.raises(RefusedError, match="holds numbers that are not finite"):
        fresh.resume([7])
    after = fresh._own.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "folder", Path.rename
    with whole_folder(target) as made:
        (made / "a").write_text("1")

    def refuses(path: Path, to: Path) -> Path:
        if to == target and not path.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match="No space left"), whole_folder(target) as made:
        (made / "a").write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "a").read_text() == "1"


def test_only_their_owner_reads_checkpoints(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder") as made:
        (made / "a").write_text("1")
    assert (tmp_path / "folder").stat().st_mode & 0o077 == 0


def test_folders_of_other_names_are_no_checkpoints(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    device, cloud = sides(base, PLAN, tmp_path / "cloud")
    for name in ("step-0000001", "step-1", "step-000001x", "Step-000001"):
        (tmp_path / "cloud" / name).mkdir(parents=True)
    train(device, cloud, windows, None, COURSE, tmp_path / "device")
    assert Checkpoints(tmp_path / "cloud").steps() == (6, 7)
    assert (tmp_path / "cloud" / "step-0000001").is_dir()


def test_facts_a_hundred_thousand_deep(base: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    device, cloud = sides(base, PLAN, tmp_path / "cloud")
    train(device, cloud, windows, None, COURSE, tmp_path / "device")
    (tmp_path / "cloud" / "step-000007" / FACTS).write_text(100_000 * "[")
    checkpoints = Checkpoints(tmp_path / "cloud")
    assert checkpoints.steps() == (6,)
    assert "RecursionError" in checkpoints.damaged[7]
