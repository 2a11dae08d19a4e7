"""Checksums of a state's arrays, computed on the devices that hold them, in pieces that can be checked one by one.

A checkpoint notes them (checkpoint.py); whoever reads its arrays compares. For the i-th number of a piece of a shard:

    word = (bits ^ i * 0x9E3779B9) * 0x7FEB352D;  word = (word ^ word >> 15) * 0x846CA68B;  word ^= word >> 16
    sum  = the sum of all words, everything mod 2^32

A word is a bijection of the number's bits, so that one changed number always changes its piece's sum; of other damage
one case in 2^32 is not seen. Arrays that are no table's are small and whole on every device: they have a SHA-256.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_BLOCK_NUMBERS = 2**18
"""Numbers that are summed at a time: what this needs beside the array is small, and fits a CPU's cache."""

_BLOCKS_PER_PIECE = 16


def array_name(path: Any) -> str:
    """A path into a state's tree, as a checkpoint names the array there."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def of_json(value: Any) -> str:
    """SHA-256 of what `value` says as JSON."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def of_tables(tree: Any) -> dict[str, Any]:
    """The checksums of each piece of each array, by the array's path in the tree; every process must ask."""
    return {array_name(path): _of_pieces(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def of_small(tree: Any) -> dict[str, str]:
    """The SHA-256 of each array, which every process has whole, by its path in the tree."""
    return {array_name(path): _sha256(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differing(tree: Any, noted: dict[str, Any]) -> list[str]:
    """Paths of the arrays that are not those whose checksums were noted; every process must ask."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = array_name(path)
        then = noted[name]
        if (_sha256(leaf) if isinstance(then, str) else _of_pieces(leaf, then["rows"])) != then:
            found.append(name)
    return found


class StoredPieces:
    """The noted checksums of one stored array, for a reader that takes some of its rows at a time."""

    def __init__(self, read: Callable[[slice], Any], noted: dict[str, Any]) -> None:
        """`read` gives rows of the array."""
        self._read = read
        self._lines, self._lanes = noted["shard"]
        self._rows, self._sums = noted["rows"], noted["sums"]
        self._checked: set[int] = set()

    def whole(self, start: int, stop: int) -> bool:
        """Whether the pieces that hold rows `start` to `stop` are as noted; each is read and checked once."""
        return all(self._piece_is_whole(*piece) for piece in self._pieces(start, stop))

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(shard of rows, piece in it)."""
        shards = range(start // self._lines, -(-stop // self._lines))
        found = []
        for shard in shards:
            first = max(start - shard * self._lines, 0) // self._rows
            last = (min(stop - shard * self._lines, self._lines) - 1) // self._rows
            found += [(shard, piece) for piece in range(first, last + 1)]
        return found

    def _piece_is_whole(self, shard: int, piece: int) -> bool:
        per_shard = -(-self._lines // self._rows)
        number = shard * per_shard + piece
        if number in self._checked:
            return True
        start = shard * self._lines + piece * self._rows
        rows = np.asarray(self._read(slice(start, min(start + self._rows, (shard + 1) * self._lines))))
        parts = rows.shape[1] // self._lanes  # Of columns: more than one only where rows are not split.
        for part in range(parts):
            mine = np.ascontiguousarray(rows[:, part * self._lanes : (part + 1) * self._lanes])
            if int(_sums(mine, self._rows)[0]) != self._sums[number + part * per_shard]:
                return False
        self._checked.add(number)
        return True


def _sha256(array: Any) -> str:
    host = np.asarray(array)
    return hashlib.sha256(f"{host.dtype} {host.shape}".encode() + host.tobytes()).hexdigest()


def _of_pieces(array: jax.Array, rows: int = 0) -> dict[str, Any]:
    lines, lanes = array.sharding.shard_shape(array.shape)
    rows = rows or max(1, _BLOCK_NUMBERS // lanes) * _BLOCKS_PER_PIECE
    sums = _compiled(array.sharding, rows)(array)
    return {"shard": [lines, lanes], "rows": rows, "sums": np.asarray(sums).tolist()}


@functools.lru_cache(maxsize=64)
def _compiled(sharding: jax.sharding.Sharding, rows: int) -> Any:
    """Sums of an array's shards, one after the other, on every device."""
    function = functools.partial(_sums, rows=rows)
    assert isinstance(sharding, NamedSharding)
    split = next((axis for axis in sharding.spec if axis is not None), None)
    of_shards = jax.shard_map(
        function, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=PartitionSpec(split), check_vma=False
    )
    return jax.jit(of_shards, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames="rows")
def _sums(shard: jax.Array, rows: int) -> jax.Array:
    """The sum of each piece of `rows` rows."""
    lines, lanes = shard.shape
    block = min(lines, max(1, rows // _BLOCKS_PER_PIECE))
    place_bxn = jnp.arange(block * lanes, dtype=jnp.uint32).reshape(block, lanes)

    def add(i: jax.Array, sums: jax.Array) -> jax.Array:
        start = jnp.minimum(i * block, lines - block)  # The last block begins earlier, and leaves out what was added.
        numbers = jax.lax.dynamic_slice(shard, (start, 0), (block, lanes))
        piece = i * block // rows
        first = (start - piece * rows).astype(jnp.uint32) * np.uint32(lanes)
        word = (_bits(numbers) ^ (place_bxn + first) * np.uint32(0x9E3779B9)) * np.uint32(0x7FEB352D)
        word = (word ^ word >> 15) * np.uint32(0x846CA68B)
        word = word ^ word >> 16
        new = start + jnp.arange(block)[:, None] >= i * block
        return sums.at[piece].add(jnp.where(new, word, 0).sum(dtype=jnp.uint32))

    return jax.lax.fori_loop(0, -(-lines // block), add, jnp.zeros(-(-lines // rows), jnp.uint32))


def _bits(numbers: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[numbers.dtype.itemsize]
    return jax.lax.bitcast_convert_type(numbers, kind).astype(jnp.uint32)
