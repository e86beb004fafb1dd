"""One way to compile a kernel: typed, cached on disk, without the GIL.

Signatures are explicit, so a kernel is compiled when its module is first imported (at set-up, see ``make setup``) and
read from the cache ever after; a call can never compile.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
from numba import types

P = ParamSpec("P")
R = TypeVar("R")


READ_ONLY_ROWS = types.Array(types.uint32, 2, "C", readonly=True)
"""The type of a uint32 matrix that lies in received bytes: kernels read it where it is."""
READ_ONLY_FLOATS = types.Array(types.float32, 1, "C", readonly=True)
"""The type of a float32 vector that the caller may have locked."""


def compiled(signature: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``numba.njit`` with the settings that every kernel shares, keeping the Python types of the function."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        return cast(Callable[P, R], numba.njit(signature, nogil=True, cache=True)(function))

    return wrap
