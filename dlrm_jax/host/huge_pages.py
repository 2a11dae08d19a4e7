"""Tables on huge pages: rows anywhere in gigabytes miss the processor's table of 4 KB pages at nearly every read."""

import ctypes
import sys
from typing import Any

import jax

LEAST_BYTES = 64 << 20
"""Smaller arrays stay as they are: the processor knows the places of their pages."""
_HUGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def collapse(arrays: Any) -> int:
    """Put the large arrays of a tree, where they lie in this machine's memory, on huge pages; how many bytes now do.

    Values and addresses stay. It takes about two seconds a gigabyte, once. Nothing happens on other systems than Linux
    (6.1 and later), or where it has no huge pages left.
    """
    if not sys.platform.startswith("linux"):
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    jax.block_until_ready(arrays)  # To ask for the place of an array whose allocation failed would be an abort.
    done = 0
    for start, num_bytes in sorted({place for array in jax.tree.leaves(arrays) for place in _places(array)}):
        first, end = -(-start // _HUGE) * _HUGE, (start + num_bytes) // _HUGE * _HUGE
        if advise(first, end - first, _MADV_HUGEPAGE) == 0 and advise(first, end - first, _MADV_COLLAPSE) == 0:
            done += end - first
    return done


def _places(array: Any) -> list[tuple[int, int]]:
    """(address, bytes) of the array's large shards in this process' memory."""
    if not isinstance(array, jax.Array) or array.nbytes < LEAST_BYTES:
        return []
    shards = [shard.data for shard in array.addressable_shards if shard.device.platform == "cpu"]
    return [(shard.unsafe_buffer_pointer(), shard.nbytes) for shard in shards if shard.nbytes >= LEAST_BYTES]
