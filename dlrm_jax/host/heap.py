"""Memory that comes and goes, chunk after chunk and step after step: kept by the process instead of given back."""

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_M_ARENA_MAX = -8
_CHUNKS = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20), (_M_TOP_PAD, 4 << 20))
_STEPS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 4 << 20))


def keep_freed_chunks() -> bool:
    """Tell glibc's allocator to keep arrays of up to 32 MB that were freed; whether it was told.

    Every chunk of a log needs the same arrays as the one before, and the kernel would clear their pages anew each time.
    """
    return _tell(_CHUNKS)


def keep_freed_temporaries() -> bool:
    """The same for arrays of any size: a step on a CPU gets its temporaries anew in each step. Up to 1 GB is kept.

    For after the tables are made: what is freed below something that stays is only used again, never given back.
    """
    return _tell(_STEPS)


def share_one() -> bool:
    """Tell glibc's allocator that all threads share one heap, where each reserves 64 MB of addresses for itself."""
    return _tell(((_M_ARENA_MAX, 1),))


def give_back() -> None:
    """Give what is kept back to the machine, as far as whole pages are free."""
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)


def kept_bytes() -> int:
    """Bytes that were freed and are kept: this process gets them again without asking the machine."""
    if (info := _of_libc("mallinfo2")) is None:  # glibc has it since 2.33.
        return 0
    info.restype = _Mallinfo
    return int(info().fordblks)


class _Mallinfo(ctypes.Structure):
    _fields_ = (
        *((f"other_{i}", ctypes.c_size_t) for i in range(8)),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def _of_libc(name: str) -> Any:
    """A function of glibc; None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def _tell(settings: tuple[tuple[int, int], ...]) -> bool:
    mallopt = _of_libc("mallopt")  # Another libc than glibc has none.
    return mallopt is not None and all(mallopt(parameter, value) for parameter, value in settings)
