"""Publications are untrusted: whatever bytes come, reading them ends in a checked publication or one of two errors."""

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from splitveil.errors import ParameterError, PublicationError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.published import MAX_NAME, MAX_NORM_BOUND, MAX_STEP, MAX_WIDTH, Publication, PublicLayer

RANDOM = np.random.default_rng(0)


def layer(index: int, *, full_rank: bool) -> PublicLayer:
    q = None if full_rank else np.linalg.qr(RANDOM.standard_normal((5, 2)))[0].astype(np.float32)
    outputs = ((f"m{index}", 2),) if full_rank else ((f"m{index}", 2), (f"n{index}", 3))
    return PublicLayer(9, 2, 0.5, 30_000, outputs, q, RANDOM.integers(0, 2**32, (2, 64), dtype=np.uint32))


GOOD = Publication(
    bytes(16), bytes(32), "lattice", INSECURE_TEST, 0.0, (layer(0, full_rank=False), layer(1, full_rank=True))
).to_bytes()
HEADER_SIZE = int.from_bytes(GOOD[:8], "little")
FILE_HEADER = json.loads(GOOD[8 : 8 + HEADER_SIZE])
DESCRIPTION = json.loads(FILE_HEADER["__metadata__"]["splitveil"])
TENSORS = GOOD[8 + HEADER_SIZE :]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["lattice", "plain", "insecure_64", "lattice-2048-1024", 2**64, -1, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def read(data: bytes) -> None:
    """Reads the bytes; what is accepted obeys every limit."""
    refused = ""
    try:
        publication = Publication.from_bytes(data, allow_insecure=True)
    except (PublicationError, ParameterError) as error:
        refused = str(error)
    if refused:
        assert refused.isprintable()
        assert len(refused) < 1000
        return
    assert len(publication.id) == 16
    assert len(publication.seed) == 32
    assert 0 <= publication.noise <= 10
    names = [name for made in publication.layers for name, _ in made.outputs]
    assert len(names) == len(set(names))
    assert all(name.isprintable() and 0 < len(name) <= MAX_NAME for name in names)
    for made in publication.layers:
        assert 1 <= made.norm_bound <= MAX_NORM_BOUND
        assert 0 < made.step <= MAX_STEP
        assert 1 <= made.width <= MAX_WIDTH
        total = sum(size for _, size in made.outputs)
        assert made.rank == total if made.Q is None else made.Q.shape == (total, made.rank)
        assert made.Q is None or (made.Q.dtype == np.float32 and np.isfinite(made.Q).all())
        if publication.engine == "lattice":
            assert made.hint is not None
            assert made.hint.shape == (made.rank, publication.parameters.ring_degree)
            assert made.hint.dtype == np.uint32


def build(header: Any, tensors: bytes = TENSORS) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def described(description: Any) -> bytes:
    return build({**FILE_HEADER, "__metadata__": {"splitveil": json.dumps(description)}})


PLACES = st.integers(0, len(GOOD) - 1) | st.integers(0, HEADER_SIZE + 8)


def test_the_unchanged_publication_is_read() -> None:
    Publication.from_bytes(GOOD, allow_insecure=True)
    Publication.from_bytes(described(DESCRIPTION), allow_insecure=True)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    read(bytes(data))


@settings(max_examples=200, deadline=None)
@given(PLACES, PLACES, st.binary(max_size=30))
def test_pieces_cut_out_and_put_in(first: int, second: int, piece: bytes) -> None:
    low, high = sorted((first, second))
    read(GOOD[:low] + piece + GOOD[high:])
    read(GOOD[:low])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    read(data)
    read(len(data).to_bytes(8, "little") + data)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(DESCRIPTION)), JSON)
def test_any_json_in_place_of_a_field(key: str, value: Any) -> None:
    read(described({**DESCRIPTION, key: value}))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(DESCRIPTION["layers"][0])), JSON)
def test_any_json_in_place_of_a_field_of_a_layer(key: str, value: Any) -> None:
    read(described({**DESCRIPTION, "layers": [{**DESCRIPTION["layers"][0], key: value}]}))


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_json_in_place_of_the_description(value: Any) -> None:
    read(described(value))
    read(build({**FILE_HEADER, "__metadata__": {"splitveil": value}}))
    read(build({**FILE_HEADER, "__metadata__": value}))
    read(build(value))


DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
    "C64",
    "F4",
]
SIZES = st.integers(0, 64) | st.sampled_from([2**32, 2**63, 2**64, -1])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["Q.0", "Q.1", "hint.0", "hint.1", "other\x1b[31m"]),
    st.sampled_from(DTYPES),
    st.lists(SIZES, max_size=3),
    st.tuples(SIZES, SIZES),
)
def test_any_tensor_description(name: str, dtype: str, shape: list[int], offsets: tuple[int, int]) -> None:
    read(build({**FILE_HEADER, name: {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}}))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(DESCRIPTION)), st.integers(1, 1200), st.booleans())
def test_nested_json(key: str, depth: int, closed: bool) -> None:
    nest = "[" * depth + ("]" * depth if closed else "")
    text = json.dumps({**DESCRIPTION, key: "@"}).replace('"@"', nest)
    read(build({**FILE_HEADER, "__metadata__": {"splitveil": text}}))
