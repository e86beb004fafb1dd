"""Coarser numbers, as a crossing that saves bandwidth would send them: int8, int4, bfloat16."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from splitveil.errors import NonFiniteError
from splitveil.split import Crossing


class _Rounding(ABC):
    """Every entry of a text position replaced by a nearby one; positions without text stay as they are."""

    name: ClassVar[str]
    summary: ClassVar[str]
    bits: ClassVar[int]

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """``bits`` an entry takes on the wire."""
        return {"bits": self.bits}

    def width(self, width: int) -> int:
        """How wide the defended crossing of a plain one of ``width`` is: the same."""
        return width

    def bytes_a_position(self, width: int) -> float:
        """Whole bytes of ``bits`` an entry."""
        return float(math.ceil(self.bits * width / 8))

    def protect(self, crossing: Crossing) -> Crossing:
        """What the cloud has after decoding: the same dtype and shape.

        Raises ``NonFiniteError`` where a state is NaN or infinite.
        """
        states = crossing.hidden[crossing.text].float()
        if not bool(states.isfinite().all()):
            raise NonFiniteError("a hidden state is NaN or infinite; it cannot be quantised")
        hidden = crossing.hidden.clone()
        hidden[crossing.text] = self._rounded(states).to(hidden.dtype)
        return crossing.with_hidden(hidden)

    @abstractmethod
    def _rounded(self, states: Tensor) -> Tensor:
        """(rows, width) float32, and the same decoded."""


class _Absmax(_Rounding):
    """Symmetric integers, one scale a position: scale = max|h|/(2^(bits−1) − 1), entries rounded to multiples of it."""

    def bytes_a_position(self, width: int) -> float:
        """Whole bytes of ``bits`` an entry, and the scale in float32."""
        return super().bytes_a_position(width) + 4

    def _rounded(self, states: Tensor) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        scale: Tensor = states.abs().amax(-1, keepdim=True) / top
        # A row of zeros has no scale; it stays a row of zeros.
        steps = (states / torch.where(scale > 0, scale, 1.0)).round().clamp(-top, top)
        return steps * scale


class Int8(_Absmax):
    """Each entry within max|h|/254 of what it was."""

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "8-bit integers, symmetric, one scale a position"
    bits: ClassVar[int] = 8


class Int4(_Absmax):
    """Each entry within max|h|/14 of what it was."""

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "4-bit integers, symmetric, one scale a position"
    bits: ClassVar[int] = 4


class BFloat16(_Rounding):
    """Each entry within 2^−9 of its own size; nothing changes where the model runs in bfloat16 already."""

    name: ClassVar[str] = "bfloat16"
    summary: ClassVar[str] = "bfloat16 numbers"
    bits: ClassVar[int] = 16

    def _rounded(self, states: Tensor) -> Tensor:
        return states.bfloat16().float()
