"""The project's 64-bit hash of values, the same on every machine, version and input format.

    mix(x):    x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31   (mod 2^64)
    integers:  hash64(v, seed) = mix(v + (seed + 1) * 0x9E3779B97F4A7C15)
    bytes:     h = hash64(length, seed); then for each little-endian 8-byte word, the last one padded with zeros:
               h = mix(h ^ word)

`mix` is the finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_FEW = 16
"""At most this many long strings are finished one by one, which is faster than by tiny arrays."""


def mix(x: np.ndarray) -> np.ndarray:
    """The bijection of the module's text, on uint64; changes `x` in place where it can."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash_integers(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """uint64 hashes of integers; a negative one counts as its two's complement."""
    offset = np.uint64((seed + 1) * int(_GOLDEN) & _MASK)
    return mix(values.astype(np.int64, copy=False).view(np.uint64) + offset)


def hash_strings(values: "pa.Array", seed: int = 0) -> np.ndarray:
    """uint64 hashes of the UTF-8 bytes of a string array without nulls."""
    values = values.cast("large_string")
    _, offset_buffer, data_buffer = values.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[values.offset : values.offset + len(values) + 1]
    start, length = offsets[:-1], np.diff(offsets)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    # Eight zeros behind the last byte, so that a word may be read at every byte.
    padded = np.concatenate([data[: offsets[-1]], np.zeros(8, np.uint8)]) if len(values) else np.zeros(8, np.uint8)
    words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))
    hashes = hash_integers(length, seed)
    active = np.flatnonzero(length > 0)
    word = 0
    while len(active) > _FEW:
        rest = length[active] - 8 * word
        value = words[start[active] + 8 * word]
        # The bytes behind the string's end are cleared; a shift by 64 would be undefined, so whole words are left.
        spare = np.where(rest < 8, (8 - np.minimum(rest, 8)) * 8, 0).astype(np.uint64)
        value = (value << spare) >> spare
        hashes[active] = mix(hashes[active] ^ value)
        word += 1
        active = active[rest > 8]
    for i in active:
        tail = padded[start[i] + 8 * word : start[i] + length[i]].tobytes()
        hashes[i] = _continue_hash(int(hashes[i]), tail)
    return hashes


def hash_integer(value: int, seed: int = 0) -> int:
    """`hash_integers` of one Python integer."""
    return _mix(value + (seed + 1) * int(_GOLDEN) & _MASK)


def hash_text(text: bytes, seed: int = 0) -> int:
    """`hash_strings` of one text's UTF-8 bytes."""
    return _continue_hash(hash_integer(len(text), seed), text)


def _mix(h: int) -> int:
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB & _MASK
    return h ^ (h >> 31)


def _continue_hash(h: int, tail: bytes) -> int:
    for (word,) in struct.iter_unpack("<Q", tail + bytes(-len(tail) % 8)):
        # _mix, written out: a call takes as long as its work, and a server reads texts of any length.
        h ^= word
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & _MASK
        h ^= h >> 31
    return h
