"""Ids by a power law, drawn in whole numbers, so that NumPy and every device draw the same ones.

The id of frequency rank k (1-based; ids are ranks, so id 0 is the most frequent) occurs in proportion to k^-skew, by
the continuous law P(rank <= k) ~ integral from 1 to k + 1. Uniform numbers of float32 have 24 bits and reach 16 million
rows; so a segment of neighbouring ranks is drawn by its probability, in 2^-32, and one of its ranks, all alike. A
segment is one rank where ranks differ much; within one the law falls by a factor of at most 1 + 2^-8.

A segment is drawn in two look-ups (Walker 1977, "An efficient method for generating discrete random variables"): 2^n
slots are alike, and each holds what is left of its own segment's share and, above that, some of another's. Of shares
5/8, 2/8, 1/8 the 4 slots, of 2/8 each, hold: 0 alone | 1 alone | 2 for 1/8, then 0 | 0, as there is no segment 3.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from dlrm_jax.model.hashing import mix

_SEGMENT_FALL = 1 + 2**-8
_WIDE = 2**20
"""Ranks of a segment beyond which 32 random bits would make some of them likelier than others by more than 2^-12."""


class Law(NamedTuple):
    """Slots of some tables, one table after the other: a column's ids are drawn by the 2^bits from `start_K` on."""

    bits_K: np.ndarray
    start_K: np.ndarray
    most_ranks_T: np.ndarray
    """Ranks of a table's widest segment."""
    own_S: np.ndarray
    """How much of a slot is its own segment, in 2^-32; above that it is the one of slot `other_S`."""
    other_S: np.ndarray
    first_S: np.ndarray
    ranks_S: np.ndarray


def _cumulative(k: np.ndarray, rows: int, skew: float) -> np.ndarray:
    """P(rank < k), by the continuous law."""
    if abs(skew - 1) < 1e-9:
        return np.log(k + 1.0) / np.log(rows + 1.0)
    return ((k + 1.0) ** (1 - skew) - 1) / ((rows + 1.0) ** (1 - skew) - 1)


def segments(rows: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """(first ranks of the segments, and `rows`; P(rank < first) of all but the first segment, in 2^-32)."""
    fall = _SEGMENT_FALL ** (1 / skew) if skew > 0 else float("inf")
    first = [0]
    while first[-1] < rows:
        first.append(min(rows, max(first[-1] + 1, int(min((first[-1] + 1) * fall, rows + 1.0)) - 1)))
    below = np.floor(_cumulative(np.array(first[1:-1], np.float64), rows, skew) * 2**32)
    return np.array(first, np.int32), np.minimum(below, 2**32 - 1).astype(np.uint32)


@functools.cache
def _slots(rows: int, skew: float) -> Law:
    """Of one table and a column of its ids."""
    first, below = segments(rows, skew)
    shares = np.diff(below, prepend=0, append=2**32).tolist()
    bits = max(1, (len(shares) - 1).bit_length())
    each, unused = 2**32 >> bits, 2**bits - len(shares)
    own, other = shares + [0] * unused, list(range(2**bits))
    poor = [slot for slot, share in enumerate(own) if share < each]
    rich = [slot for slot, share in enumerate(own) if share > each]
    while poor:  # All shares together are all slots together, so there is a rich one as long as there is a poor one.
        slot = poor.pop()
        other[slot] = rich[-1]
        own[rich[-1]] -= each - own[slot]
        if own[rich[-1]] <= each:
            last = rich.pop()
            poor += [last] * (own[last] < each)
    return Law(
        np.array([bits], np.uint32),
        np.array([0], np.uint32),
        np.diff(first).max(keepdims=True),
        np.array(own, np.uint32),
        np.array(other, np.uint32),
        np.pad(first[:-1], (0, unused)),
        np.pad(np.diff(first), (0, unused), constant_values=1).astype(np.uint32),
    )


def law_of(rows_K: np.ndarray, skew: float) -> Law:
    """What ids of some columns are drawn by, `rows_K` being those of each one's table; tables as large share slots."""
    sizes, size_K = np.unique(rows_K, return_inverse=True)
    tables = [_slots(int(rows), skew) for rows in sizes]
    starts = np.cumsum([0, *(len(table.own_S) for table in tables)][:-1]).astype(np.uint32)
    bits, _, most, own, other, first, ranks = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    other += np.repeat(starts, 1 << bits)
    return Law(bits[size_K], starts[size_K], most, own, other, first, ranks)


def draw(xp: Any, law: Law, choice_BxK: Any, place_BxK: Any) -> Any:
    """int32 ids (ranks from 0) of 64 random bits each, by `xp`: numpy, or jax.numpy on a device."""

    def at(values: np.ndarray, slot: Any) -> Any:
        return xp.take(xp.asarray(values), slot, axis=0, mode="clip")  # None is outside, but looking costs more.

    shift_1xK = np.uint32(32) - law.bits_K[None]
    slot = (choice_BxK >> shift_1xK) + law.start_K[None]
    rest = choice_BxK & ((np.uint32(1) << shift_1xK) - np.uint32(1))
    slot = xp.where(rest < at(law.own_S, slot), slot, at(law.other_S, slot))
    ranks = at(law.ranks_S, slot)
    wide = law.most_ranks_T.max() > _WIDE
    place = _below(place_BxK, mix(choice_BxK), ranks) if wide else _product(place_BxK, ranks)[0]
    return at(law.first_S, slot) + place.astype(xp.int32)


def _below(high: Any, low: Any, bound: Any) -> Any:
    """floor((high * 2^32 + low) * bound / 2^64) in 32-bit words: a number below `bound`, all as likely as can be."""
    over, rest = _product(high, bound)
    carried, _ = _product(low, bound)
    return over + ((rest + carried) < rest).astype(over.dtype)


def _product(a: Any, b: Any) -> tuple[Any, Any]:
    """(upper, lower) 32 bits of a * b, from 16-bit halves."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    other = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (other >> 16), a * b
