"""Rows of numbers as bytes, in the smallest form that gives back exactly these numbers, and checked on the way back.

Which form that is, is read off the numbers: states that were rounded to four bits by a defence travel as four bits and
a scale a row, whatever rounded them. Every form but the full one is tried by undoing it, so what is taken is exact, bit
by bit, the sign of zeros included.
"""

import sys
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ProtocolError

F32: TypeAlias = NDArray[np.float32]
U32: TypeAlias = NDArray[np.uint32]

if sys.byteorder != "little":  # numbers are written to the wire as they lie in memory
    raise ImportError("splitveil needs a little-endian machine")


class Encoding(IntEnum):
    """How rows are written."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3
    """One float32 scale a row; −128 stands for −0."""
    INT4 = 4
    """The same with two entries a byte, the first in the low half, rows padded to whole bytes; −8 stands for −0."""
    SPARSE = 5
    """For each row how many entries are not +0; their places, rising; their values as float32."""


class DType(IntEnum):
    """What the numbers were, and are again: all values fit float32."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


_TOPS = {Encoding.INT8: 127, Encoding.INT4: 7}
_SCALE_TRIES = 3  # units in the last place by which a scale that is found from its largest multiple may be off


@dataclass(frozen=True)
class Packed:
    """Rows as they travel."""

    encoding: int
    dtype: int
    values: bytes = field(repr=False)
    scales: bytes = field(default=b"", repr=False)
    indices: bytes = field(default=b"", repr=False)

    @property
    def size(self) -> int:
        """Bytes of what is in it."""
        return len(self.values) + len(self.scales) + len(self.indices)


def pack(rows: F32, dtype: DType = DType.FLOAT32) -> Packed:
    """Rows (count, width) of float32 in their smallest exact form. NaN and infinity travel in the full form."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    whole = _integers(rows, dtype, Encoding.INT4) or _integers(rows, dtype, Encoding.INT8) or _sixteen(rows, dtype)
    forms = [form for form in (whole, _sparse(rows, dtype)) if form is not None]
    best = min(forms, key=lambda form: form.size, default=None)
    if best is None or best.size >= rows.nbytes:
        return Packed(Encoding.FLOAT32, dtype, rows.tobytes())
    return best


def unpack(packed: Packed, count: int, width: int, *, finite: bool = True) -> F32:
    """The rows (count, width), float32, all finite. Raises ``ProtocolError`` before anything of that size is made.

    ``count`` and ``width`` are what is expected, within the caller's own limits. Without ``finite`` the caller looks
    for NaN and infinity itself.
    """
    try:
        encoding, dtype = Encoding(packed.encoding), DType(packed.dtype)
    except ValueError:
        raise ProtocolError(
            f"numbers of the unknown encoding {packed.encoding} or type {packed.dtype}; is the other side newer?"
        ) from None
    match encoding:
        case Encoding.SPARSE:
            rows = _from_sparse(packed, count, width)
        case Encoding.INT8 | Encoding.INT4:
            rows = _from_integers(packed, encoding, count, width)
        case _:
            size = 4 if encoding is Encoding.FLOAT32 else 2
            _expect("values", packed.values, count * width * size)
            _expect("scales", packed.scales, 0)
            _expect("indices", packed.indices, 0)
            rows = _from_floats(packed.values, encoding).reshape(count, width)
    if finite and not bool(np.isfinite(rows).all()):
        raise ProtocolError("a number is NaN or infinite; only finite ones are taken")
    if not _fits(rows, dtype):
        raise ProtocolError(f"numbers that are announced as {dtype.name.lower()} are none")
    return rows


# -- floats ------------------------------------------------------------------------------------------------------------


def _bits(rows: F32) -> U32:
    bits: U32 = rows.view(np.uint32)
    return bits


def _half(rows: F32) -> NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):  # a number that float16 has not is found by comparing
        half: NDArray[np.float16] = rows.astype(np.float16)
    return half


def _same(one: F32, other: F32) -> bool:
    return bool(np.array_equal(_bits(one), _bits(other)))


def _fits(rows: F32, dtype: DType) -> bool:
    """Whether all numbers are of that type."""
    match dtype:
        case DType.BFLOAT16:
            return not bool((_bits(rows) & 0xFFFF).any())
        case DType.FLOAT16:
            return _same(_half(rows).astype(np.float32), rows)
    return True


def _sixteen(rows: F32, dtype: DType) -> Packed | None:
    # One row tells most of the time.
    for kind in (DType.BFLOAT16, DType.FLOAT16):
        if _fits(rows[:1], kind) and _fits(rows, kind):
            if kind is DType.FLOAT16:
                return Packed(Encoding.FLOAT16, dtype, _half(rows).tobytes())
            return Packed(Encoding.BFLOAT16, dtype, (_bits(rows) >> 16).astype(np.uint16).tobytes())
    return None


def _from_floats(values: bytes, encoding: Encoding) -> F32:
    if encoding is Encoding.FLOAT32:
        return np.frombuffer(values, np.float32)
    if encoding is Encoding.FLOAT16:
        return np.frombuffer(values, np.float16).astype(np.float32)
    wide: U32 = np.frombuffer(values, np.uint16).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


# -- integers with a scale ---------------------------------------------------------------------------------------------


def _integers(rows: F32, dtype: DType, encoding: Encoding) -> Packed | None:
    """Rows that are whole multiples of one scale each, the largest of them 127 (7) times it."""
    if not rows.size or _scaled(rows[:1], _TOPS[encoding]) is None:
        return None
    found = _scaled(rows, _TOPS[encoding])
    if found is None:
        return None
    codes, scales = found
    values = codes.tobytes() if encoding is Encoding.INT8 else _nibbles(codes).tobytes()
    return Packed(encoding, dtype, values, scales.tobytes())


def _scaled(rows: F32, top: int) -> tuple[NDArray[np.int8], F32] | None:
    """(codes, scales) that give exactly these rows, or None."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not bool(np.isfinite(largest).all()):
        return None
    first: F32 = (largest / np.float32(top)).astype(np.float32)
    codes = np.zeros(rows.shape, np.int8)
    scales = np.zeros((len(rows), 1), np.float32)
    missing = np.ones(len(rows), bool)
    for tries in range(2 * _SCALE_TRIES + 1):
        # 0, +1, −1, +2, … units in the last place; the bits of positive floats are in their order.
        off = (tries + 1) // 2 * (1 if tries % 2 else -1)
        here = np.flatnonzero(missing)
        bits = _bits(first[here]).astype(np.int64) + off
        scale = np.where(bits >= 0, bits, 0).astype(np.uint32).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            steps = np.rint(rows[here] / np.where(scale > 0, scale, np.float32(1)))
            steps = np.clip(steps, -top, top)
            steps = np.where(np.isnan(steps), 0, steps)
        code = steps.astype(np.int8)
        code[(code == 0) & np.signbit(rows[here])] = -top - 1
        with np.errstate(over="ignore", invalid="ignore"):
            same = (_bits(_multiples(code, scale, top)) == _bits(rows[here])).all(axis=1)
        codes[here[same]], scales[here[same]] = code[same], scale[same]
        missing[here[same]] = False
        if not missing.any():
            return codes, scales
    return None


def _multiples(codes: NDArray[np.int8], scales: F32, top: int) -> F32:
    steps = codes.astype(np.float32)
    steps[codes == -top - 1] = -0.0
    multiples: F32 = steps * scales
    return multiples


def _nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).view(np.uint8) & np.uint8(15)
    packed: NDArray[np.uint8] = padded[:, 0::2] | (padded[:, 1::2] << np.uint8(4))
    return packed


def _from_integers(packed: Packed, encoding: Encoding, count: int, width: int) -> F32:
    across = width if encoding is Encoding.INT8 else (width + 1) // 2
    _expect("values", packed.values, count * across)
    _expect("scales", packed.scales, 4 * count)
    _expect("indices", packed.indices, 0)
    scales = np.frombuffer(packed.scales, np.float32).reshape(count, 1)
    if not bool((np.isfinite(scales) & (scales >= 0)).all()):
        raise ProtocolError("a row's scale is negative, NaN or infinite")
    raw = np.frombuffer(packed.values, np.uint8).reshape(count, across)
    if encoding is Encoding.INT4:
        both = np.stack([raw & np.uint8(15), raw >> np.uint8(4)], axis=2).reshape(count, 2 * across)[:, :width]
        raw = np.where(both > 7, both | np.uint8(0xF0), both)
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as that
        return _multiples(raw.view(np.int8), scales, _TOPS[encoding])


# -- few entries -------------------------------------------------------------------------------------------------------


def _sparse(rows: F32, dtype: DType) -> Packed | None:
    there = _bits(rows) != 0
    kind = np.dtype(np.uint16 if rows.shape[1] <= 1 << 16 else np.uint32)
    if np.count_nonzero(there) * (4 + kind.itemsize) + 4 * len(rows) >= rows.nbytes:
        return None
    places = np.nonzero(there)[1].astype(kind)
    counts = there.sum(axis=1, dtype=np.uint32)
    return Packed(Encoding.SPARSE, dtype, rows[there].tobytes(), counts.tobytes(), places.tobytes())


def _from_sparse(packed: Packed, count: int, width: int) -> F32:
    kind = np.dtype(np.uint16 if width <= 1 << 16 else np.uint32)
    _expect("counts", packed.scales, 4 * count)
    counts = np.frombuffer(packed.scales, np.uint32).astype(np.int64)
    total = int(counts.sum())
    if count and int(counts.max()) > width:
        raise ProtocolError(f"a row of {int(counts.max())} entries, {width} are there")
    _expect("values", packed.values, 4 * total)
    _expect("indices", packed.indices, kind.itemsize * total)
    places = np.frombuffer(packed.indices, kind).astype(np.int64)
    owners = np.repeat(np.arange(count), counts)
    flat = owners * width + places
    if total and (int(places.max()) >= width or not bool((np.diff(flat) > 0).all())):
        raise ProtocolError("places of entries that are not rising, or beyond the row")
    rows = np.zeros((count, width), np.float32)
    rows.reshape(-1)[flat] = np.frombuffer(packed.values, np.float32)
    return rows


def _expect(what: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise ProtocolError(f"{what} of {len(data)} bytes where {size} are expected")
