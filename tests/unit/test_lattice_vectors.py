"""Known answers: the public randomness and the ring, against files that any implementation can be tested with."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vectors import generate

from splitveil.lattice.randomness import public_element
from splitveil.lattice.ring import FixedElement, multiply, reflect

FOLDER = Path(__file__).resolve().parents[1] / "vectors"


def cases(name: str) -> list[Any]:
    """The vectors of one file, as test parameters with their names."""
    read = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert read["format"] == generate.FORMAT
    return [pytest.param(vector, id=vector["name"]) for vector in read["vectors"]]


@pytest.mark.parametrize("name", generate.FILES)
def test_the_files_are_what_the_reference_makes(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == generate.text(name)


def test_every_file_is_generated() -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == generate.FILES.keys()


@pytest.mark.parametrize("vector", cases("public_element.json"))
def test_public_element(vector: dict[str, Any]) -> None:
    arguments = (bytes.fromhex(vector["id"]), bytes.fromhex(vector["seed"]))
    numbers = (vector["width"], vector["index"], vector["degree"])
    if vector["expect"] == "ValueError":
        with pytest.raises(ValueError, match="16 bytes and a seed of 32"):
            public_element(*arguments, *numbers)
        return
    assert vector["expect"] == "success"
    element = public_element(*arguments, *numbers)
    assert element.dtype == np.uint32
    assert element[:4].tolist() == vector["first"]
    raw = element.astype("<u4").tobytes()
    assert hashlib.sha256(raw).hexdigest() == vector["sha256"]
    assert hashlib.shake_256(bytes.fromhex(vector["message"])).digest(len(raw)) == raw


@pytest.mark.parametrize("vector", cases("ring_product.json"))
def test_ring_product(vector: dict[str, Any]) -> None:
    fixed = np.array(vector["fixed"], dtype=np.uint32)
    small = np.array([vector["small"]], dtype=np.int32)
    if vector["expect"] == "ValueError":
        with pytest.raises(ValueError, match="too long for an exact product"):
            multiply(FixedElement.of(fixed), small)
        return
    assert vector["expect"] == "success"
    assert multiply(FixedElement.of(fixed), small)[0].tolist() == vector["product"]
    assert reflect(fixed).tolist() == vector["reflected"]
