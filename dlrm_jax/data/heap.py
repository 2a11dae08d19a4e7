"""Memory between the chunks of a preparation: kept by the process, instead of given back and asked for again."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20), (_M_TOP_PAD, 4 << 20))


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed; whether it was told.

    Every chunk needs the same arrays of megabytes as the one before, and the kernel would clear their pages anew each
    time: a quarter of the system's time of a preparation. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(parameter, value) for parameter, value in _SETTINGS)
