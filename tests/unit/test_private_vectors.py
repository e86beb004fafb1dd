"""Known answers: a whole exchange with all randomness given, and publications that must be refused."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from splitveil import errors
from splitveil.errors import ProtocolError, SplitveilError
from splitveil.lattice import sampling
from splitveil.lattice.parameters import ParameterSet
from splitveil.lattice.ring import FixedElement, reflect
from splitveil.private.engine import WRONG_LENGTH
from splitveil.private.lattice_public import LatticePublic, LatticeSite
from splitveil.private.lattice_served import LatticeServed, _SecretLayer, hints
from splitveil.private.masks import OneTimeMask
from splitveil.private.noise import AnswerNoise
from splitveil.private.published import Publication, PublicLayer

FOLDER = Path(__file__).resolve().parents[1] / "vectors"
Json = dict[str, Any]


def cases(name: str) -> list[Any]:
    """The vectors of one file, as test parameters with their names."""
    read = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert read["format"] == "splitveil-vectors-1"
    return [pytest.param(vector, id=vector["name"]) for vector in read["vectors"]]


def words(values: object) -> NDArray[np.uint32]:
    return np.array(values, dtype=np.uint32)


def small(values: object) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


class GivenNoise(AnswerNoise):
    """The answer noise of the vector."""

    def __init__(self, values: list[int]) -> None:
        super().__init__(256.0)
        self.values = (np.array(values) & 0xFFFFFFFF).astype(np.uint32)

    def take(self, rows: int, width: int) -> NDArray[np.uint32]:
        return np.tile(self.values, (rows, 1))


@dataclass
class Setup:
    """Both halves of the layer in a vector, built from its own hint."""

    vector: Json
    site: LatticeSite
    served: LatticeServed

    @classmethod
    def of(cls, vector: Json) -> "Setup":
        parameters = ParameterSet("insecure_vectors", vector["ring_degree"], vector["pad_width"])
        core = small(vector["core"])
        rank, width = core.shape
        hint = words(vector["hint"])
        layer = PublicLayer(width, rank, vector["step"], vector["norm_bound"], (("m", rank),), None, hint)
        id_, seed = bytes.fromhex(vector["id"]), bytes.fromhex(vector["seed"])
        publication = Publication(id_, seed, "lattice", parameters, 0.0, (layer,))
        secret = _SecretLayer(np.hstack([core, small(vector["pad"])]), GivenNoise(vector["answer_noise"]))
        site = LatticePublic(publication).site([0])
        assert isinstance(site, LatticeSite)
        return cls(vector, site, LatticeServed(publication, [secret]))

    def make_mask(self, patch: pytest.MonkeyPatch) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """(mask, corrections) that the client makes of the vector's s and e."""
        patch.setattr(sampling, "ternary", lambda count: np.array(self.vector["secret"], dtype=np.int8))
        error = self.vector["error"] + self.vector["pad_error"]
        patch.setattr(sampling, "centred_binomial_2", lambda count: np.array(error, dtype=np.int8))
        (mask,) = self.site.make_masks(1)
        assert isinstance(mask, OneTimeMask)
        return mask.consume()

    def values(self, mask: NDArray[np.uint32], corrections: NDArray[np.uint32]) -> list[int]:
        """A whole exchange: what is left of the answers."""
        x = np.array([self.vector["x"]], dtype=np.float32)
        query, _ = self.site.query(x, [OneTimeMask(mask, corrections)])
        answer = np.frombuffer(self.served.answer([0], 1, query), dtype="<u4")
        return [reference.centred(value) for value in (answer - corrections).tolist()]


@pytest.mark.parametrize("vector", cases("linear_layer.json"))
def test_linear_layer(vector: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup.of(vector)
    check = {"success": succeeds, "mismatch": differs, "ProtocolError": is_refused}[vector["expect"]]
    check(setup, monkeypatch)


def succeeds(setup: Setup, patch: pytest.MonkeyPatch) -> None:
    vector, parameters = setup.vector, ParameterSet("insecure_vectors", 16, 8)
    elements = [FixedElement.of(reflect(words(element))) for element in vector["elements"]]
    error = words([[value % reference.Q for value in row] for row in vector["hint_error"]])
    assert hints(small(vector["core"]), small(vector["pad"]), error, elements, parameters).tolist() == vector["hint"]
    mask, corrections = setup.make_mask(patch)
    assert mask.tolist() == vector["mask"]
    assert corrections.tolist() == vector["corrections"]
    query, pending = setup.site.query(np.array([vector["x"]], dtype=np.float32), [OneTimeMask(mask, corrections)])
    assert query.hex() == vector["query"]
    width = len(vector["encoded"])
    encoded = np.frombuffer(query, dtype="<u4")[:width] - mask[:width]
    assert [reference.centred(value) for value in encoded.tolist()] == vector["encoded"]
    answer = setup.served.answer([0], 1, query)
    assert answer.hex() == vector["answer"]
    assert setup.values(mask, corrections) == vector["values"]
    (output,) = setup.site.recover(pending, answer)
    assert output[0] == pytest.approx(vector["output"], rel=1e-6)


def differs(setup: Setup, patch: pytest.MonkeyPatch) -> None:
    """With the vector's hint or mask in place of the right one, the exchange ends with other values."""
    mask, corrections = setup.make_mask(patch)
    assert (mask.tolist(), corrections.tolist()) != (setup.vector["mask"], setup.vector["corrections"])
    assert setup.values(words(setup.vector["mask"]), corrections) != setup.vector["values"]


def is_refused(setup: Setup, patch: pytest.MonkeyPatch) -> None:
    mask, corrections = setup.make_mask(patch)
    _, pending = setup.site.query(np.array([setup.vector["x"]], dtype=np.float32), [OneTimeMask(mask, corrections)])
    query, answer = (bytes.fromhex(setup.vector[name]) for name in ("query", "answer"))
    if len(answer) != setup.site.answer_size:
        with pytest.raises(ProtocolError, match=f"^{WRONG_LENGTH}$"):
            setup.site.recover(pending, answer)
    else:
        with pytest.raises(ProtocolError, match="the query's length"):
            setup.served.answer([0], 1, query)


@pytest.mark.parametrize("vector", cases("publication.json"))
def test_publication(vector: Json) -> None:
    data = base64.b64decode(vector["publication"])
    if vector["expect"] == "success":
        publication = Publication.from_bytes(data, allow_insecure=True)
        assert Publication.from_bytes(publication.to_bytes(), allow_insecure=True) == publication
        assert [layer.outputs for layer in publication.layers] == [(("q_proj", 2), ("v_proj", 1))]
        return
    expected: type[SplitveilError] = getattr(errors, vector["expect"])
    with pytest.raises(expected) as caught:
        Publication.from_bytes(data, allow_insecure=True)
    # It is shown on a terminal, and the file may hold anything.
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
