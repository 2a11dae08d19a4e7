"""Vocabulary: distinct 64-bit keys get ids in order of first appearance; grows without bound, looks up in bulk."""

from collections.abc import Callable

import numpy as np

from dlrm_jax.config import ConfigError

_FREE = np.int32(-1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_MAX_IDS = 2**31 - 1


class Vocabulary:
    """An open-addressing hash table over NumPy arrays: about 20 to 36 bytes a key, no Python object per key.

    `check`, where values are strings, is a second hash of each: two strings that share the first would otherwise
    silently become one id. The plain version is a dict: `ids.setdefault(key, len(ids))`.

    One thread may `encode`; any others may `find` meanwhile: arrays are only added to, or replaced by larger ones, and
    a key is stored before the slot that points to it. What they miss is asked for again by `encode`.
    """

    def __init__(self, name: str, checked: bool = False) -> None:
        self.name, self._checked = name, checked
        self._size = 0
        self._keys = np.empty(1024, np.uint64)
        self._checks = np.empty(1024 if checked else 0, np.uint64)
        self._slots = np.full(4096, _FREE)

    def __len__(self) -> int:
        return self._size

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._keys.nbytes + self._checks.nbytes + self._slots.nbytes

    @property
    def keys(self) -> np.ndarray:
        """The keys in order of their ids."""
        return self._keys[: self._size]

    def encode(self, keys: np.ndarray, checks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(id of each key as int32, positions of the keys that were new, in the order of the ids they got).

        Raises ConfigError if two values share a key but not a check.
        """
        ids = self.find(keys, checks)
        missing = np.flatnonzero(ids < 0)
        if not len(missing):
            return ids, missing
        import pyarrow as pa  # Where a model is served there is none, and nothing to be numbered.

        encoded = pa.array(keys[missing]).dictionary_encode()  # In order of first appearance, as ids are.
        rank = encoded.indices.to_numpy()
        ids[missing] = self._size + rank
        new = np.empty(len(encoded.dictionary), np.int64)
        new[rank] = missing
        self._append(encoded.dictionary.to_numpy(), checks[new] if checks is not None else None)
        if checks is not None:
            self._require_same(self._checks[ids[missing]], checks[missing])
        return ids, new

    def extend(self, keys: np.ndarray, checks: np.ndarray | None = None) -> None:
        """Give the next ids to keys that are all different and not there yet: those of a vocabulary that was saved."""
        self._append(keys, checks)

    def find(self, keys: np.ndarray, checks: np.ndarray | None = None) -> np.ndarray:
        """id of each key as int32, -1 for one that is not there."""
        slots, known, known_checks = self._slots, self._keys, self._checks
        ids = np.full(len(keys), -1, np.int32)
        active, wanted, position = np.arange(len(keys)), keys, _home(keys, len(slots))
        while len(active):
            candidate = slots.take(position)
            occupied = candidate != _FREE
            # -1 of a free slot, and an id newer than `known`, read some other key; then it is no hit.
            hit = (known.take(candidate, mode="clip") == wanted) & occupied & (candidate < len(known))
            ids[active[hit]] = candidate[hit]
            left = np.flatnonzero(occupied & ~hit)
            active, wanted = active[left], wanted[left]
            position = (position[left] + 1) & (len(slots) - 1)
        if checks is not None:
            found = np.flatnonzero(ids >= 0)
            self._require_same(known_checks.take(ids[found]), checks[found])
        return ids

    def find_one(self, key: int, check: Callable[[], int] | None = None) -> int:
        """`find` of one Python integer; -1 too if `check`, called where the key is there, is that of another value."""
        slots, mask = self._slots, len(self._slots) - 1
        position = (key * int(_GOLDEN) & _MASK) >> (64 - mask.bit_length())
        while (candidate := slots[position]) >= 0:
            if self._keys[candidate] == key:
                return int(candidate) if check is None or self._checks[candidate] == check() else -1
            position = (position + 1) & mask
        return -1

    def _require_same(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        if not np.array_equal(ours, theirs):
            raise ConfigError(
                f"table {self.name!r}: two different values have the same 64-bit hash, so that their ids would be one; "
                "prepare this column with ids: hash"
            )

    def _append(self, keys: np.ndarray, checks: np.ndarray | None) -> None:
        start, self._size = self._size, self._size + len(keys)
        if self._size > _MAX_IDS:
            raise ConfigError(f"table {self.name!r} has more than {_MAX_IDS} distinct values; use ids: hash")
        if self._size > len(self._keys):
            capacity = max(self._size, len(self._keys) * 3 // 2)
            if self._checked:  # Before the keys: whoever sees a key must see its check.
                self._checks = np.concatenate([self._checks[:start], np.empty(capacity - start, np.uint64)])
            self._keys = np.concatenate([self._keys[:start], np.empty(capacity - start, np.uint64)])
        if checks is not None:
            self._checks[start : self._size] = checks
        self._keys[start : self._size] = keys
        if 2 * self._size > len(self._slots):
            slots, start = np.full(1 << (4 * self._size - 1).bit_length(), _FREE), 0
        else:
            slots = self._slots
        # Bounded pieces, so that the temporaries of a rebuild stay small.
        for piece in range(start, self._size, 1 << 20):
            self._insert(slots, np.arange(piece, min(piece + (1 << 20), self._size), dtype=np.int32))
        self._slots = slots

    def _insert(self, slots: np.ndarray, ids: np.ndarray) -> None:
        """Put distinct new ids into free slots: all try at once, those that another overwrote try the next slot."""
        position = _home(self._keys[ids], len(slots))
        while len(ids):
            free = slots[position] == _FREE
            slots[position[free]] = ids[free]
            left = slots[position] != ids
            ids, position = ids[left], (position[left] + 1) & (len(slots) - 1)


def _home(keys: np.ndarray, num_slots: int) -> np.ndarray:
    """Fibonacci hashing: the high bits of the product are well mixed even for small consecutive keys."""
    return ((keys * _GOLDEN) >> np.uint64(64 - (num_slots.bit_length() - 1))).view(np.int64)
