"""One-time masks: what hides one row of x, and what it will have added to the answers."""

import os
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import MaskReuseError

U32 = NDArray[np.uint32]


class OneTimeMask:
    """The mask of one query row (uint32, d + n_pad) and the row of corrections ⟨hint_j, s⟩ that belongs to it.

    Consumed on use. It cannot be copied or pickled, and it is void in any process but the one that drew it: two
    queries under one mask would show the server the difference of their contents.
    """

    __slots__ = ("_content", "_process")

    def __init__(self, mask: U32, corrections: U32) -> None:
        self._content = [(mask, corrections)]
        self._process = os.getpid()

    def __repr__(self) -> str:
        return "OneTimeMask(fresh)" if self._content else "OneTimeMask(used)"

    @property
    def size(self) -> int:
        """Bytes that the mask occupies; 0 once used."""
        return sum(part.nbytes for content in self._content for part in content)

    def consume(self) -> tuple[U32, U32]:
        """(mask, corrections), the first time. Raises ``MaskReuseError`` ever after, and in a forked process."""
        try:
            content = self._content.pop()  # atomic: of two threads only one gets it
        except IndexError:
            raise MaskReuseError("a one-time mask was asked for twice; this is a defect of the caller") from None
        if self._process != os.getpid():
            raise MaskReuseError("a one-time mask was drawn before a fork and is void in the new process")
        return content

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("a one-time mask is neither copied nor pickled")

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _refuse
