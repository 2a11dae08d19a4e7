"""Tests `dlrm_jax/training/checksums.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dlrm_jax.host.mesh import MODEL, MeshShape, make_mesh
from dlrm_jax.training import checksums

ROWS, LANES = 1000, 24
"""Not a multiple of what is summed at a time."""

SPECS = [PartitionSpec(), PartitionSpec(MODEL), PartitionSpec(None, MODEL)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks and pieces from a small array."""
    monkeypatch.setattr(checksums, "_BLOCK_NUMBERS", 100)
    monkeypatch.setattr(checksums, "_BLOCKS_PER_PIECE", 3)
    jax.clear_caches()
    checksums._compiled.cache_clear()
    yield
    jax.clear_caches()
    checksums._compiled.cache_clear()


def numbers() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, LANES)).astype(np.float32)


def placed(array: np.ndarray, spec: PartitionSpec) -> jax.Array:
    return jax.device_put(array, NamedSharding(make_mesh(MeshShape(1, 4)), spec))


def plain(array: np.ndarray) -> int:
    """The sum of one piece, number by number, as the module's text has it."""
    total = 0
    for i, bits in enumerate(array.view(np.uint32).ravel().tolist()):
        word = (bits ^ i * 0x9E3779B9) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        total += word ^ word >> 16
    return total % 2**32


def test_sums_are_those_of_the_text():
    array = numbers()
    noted = checksums.of_tables({"a": placed(array, PartitionSpec(MODEL))})["a"]
    assert noted["shard"] == [250, LANES] and noted["rows"] == 12
    shards = [array[start : start + 250] for start in range(0, ROWS, 250)]
    assert noted["sums"] == [plain(shard[i : i + 12]) for shard in shards for i in range(0, 250, 12)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_changed_bit_anywhere_is_seen(spec):
    array, rng = numbers(), np.random.default_rng(1)
    noted = checksums.of_tables({"a": placed(array, spec)})
    assert checksums.differing({"a": placed(array, spec)}, noted) == []
    for row, lane in [(0, 0), (ROWS - 1, LANES - 1), *rng.integers(0, (ROWS, LANES), (20, 2))]:
        changed = array.copy()
        changed.view(np.uint32)[row, lane] ^= 1 << int(rng.integers(0, 32))
        assert checksums.differing({"a": placed(changed, spec)}, noted) == ["a"]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pieces_are_checked_one_by_one_when_they_are_read(spec):
    """A reader of rows far from the damage goes on; one that touches the damaged piece does not."""
    array = numbers()
    noted = checksums.of_tables({"a": placed(array, spec)})["a"]
    assert checksums.StoredPieces(array.__getitem__, noted).whole(0, ROWS)
    damaged = array.copy()
    damaged[613, 17] += 1
    for start in range(0, ROWS, 50):
        pieces = checksums.StoredPieces(damaged.__getitem__, noted)
        if start <= 613 < start + 50:
            assert not pieces.whole(start, start + 50)
        elif abs(start - 613) > 100:
            assert pieces.whole(start, start + 50)


def test_swapped_rows_and_zeroed_pages_are_seen():
    array = numbers()
    noted = checksums.of_tables({"a": placed(array, PartitionSpec())})
    swapped, zeroed = array.copy(), array.copy()
    swapped[[3, 4]] = array[[4, 3]]
    zeroed[100:200] = 0
    for other in (swapped, zeroed):
        assert checksums.differing({"a": placed(other, PartitionSpec())}, noted) == ["a"]


def test_small_arrays_of_any_type():
    tree = {"step": jnp.int32(3), "half": jnp.ones(5, jnp.bfloat16), "kernel": jnp.ones((2, 3))}
    noted = checksums.of_small(tree)
    assert checksums.differing(tree, noted) == []
    assert checksums.differing(tree | {"step": jnp.int32(4)}, noted) == ["step"]
    assert checksums.differing(tree | {"kernel": jnp.ones((3, 2))}, noted) == ["kernel"]


def test_no_more_than_a_block_is_held_beside_the_array():
    """Promise 2: a table may be all that fits."""
    shape = jax.ShapeDtypeStruct((2**20, 64), np.float32)
    compiled = checksums._sums.lower(shape, 2**12).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22


def test_a_record_says_the_same_after_json():
    assert checksums.of_json({"b": (1, 2.5), "a": None}) == checksums.of_json({"a": None, "b": [1, 2.5]})
    assert checksums.of_json({"a": 1}) != checksums.of_json({"a": 2})
