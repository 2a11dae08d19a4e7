"""Arrays of a size that comes again and again: their memory is used anew as soon as nobody has the one before."""

import contextlib
import math
import mmap
import sys
from typing import Any

import numpy as np

_ROUND = 1 << 16
_HUGE = 2 << 20
_SLAB = 8 << 20
"""Small arrays are cut from pieces of memory of about this size, so that they lie on huge pages too."""


class Recycler:
    """Gives arrays that begin at a page. What they hold at first is anything; fresh pages would have to be cleared.

    About as much is kept as was in use at once. Any thread may ask; an array, or any view of it, may be dropped by any
    other.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
        """As np.empty."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        room = -(-max(size, 1) // _ROUND) * _ROUND
        free = self._free.setdefault(room, [])
        try:
            memory = free.pop()
        except IndexError:
            memory, *others = _fresh(room)
            free += others
        return np.asarray(_Lease(memory, free))[:size].view(dtype).reshape(shape)


class _Lease:
    """What arrays of recycled memory are views of: with the last one the memory is free again."""

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._free = memory, free

    def __del__(self) -> None:
        self._free.append(self._memory)


def _fresh(room: int) -> list[np.ndarray]:
    """Pieces of `room` bytes, at least one."""
    count = max(1, _SLAB // room)
    size = -(-count * room // _HUGE) * _HUGE
    if sys.platform == "win32":
        pages = mmap.mmap(-1, size)
    else:  # Pages that are shared with child processes, the default, are never huge.
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # A kernel may be built without them.
            pages.madvise(mmap.MADV_HUGEPAGE)
    return list(np.frombuffer(pages, np.uint8)[: count * room].reshape(count, room))
