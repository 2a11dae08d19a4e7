"""Tests `packed.py`: packed rows hold a batch's bits, on the host and in a jitted step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.data import packed
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.packed import PADDING

SHAPES = [(13, 26), (0, 1), (1, 0), (3, 7)]


def some_batch(num_dense: int, num_slots: int, *leading: int) -> Batch:
    """Any bits at all: among the floats are NaNs of every kind, infinities and numbers below the least normal one."""
    rng = np.random.default_rng(num_dense)

    def bits(*shape: int) -> np.ndarray:
        found = rng.integers(-(2**31), 2**31, (*leading, *shape)).astype(np.int32)
        found.reshape(-1)[::3] &= ~0x7F800000  # Exponents of zeros: numbers below the least normal one.
        found.reshape(-1)[1::3] |= 0x7F800000  # And all ones: NaNs and infinities.
        return found

    dense, label, weight = (column.view(np.float32) for column in (bits(num_dense), bits(), bits()))
    return Batch(dense_BxN=dense, ids_BxK=bits(num_slots), label_B=label, weight_B=weight)


def as_bits(tree):
    return jax.tree.map(lambda x: np.ascontiguousarray(x).view(np.int32), tree)


@pytest.mark.parametrize("leading", [(), (5,), (3, 4)])
@pytest.mark.parametrize(("num_dense", "num_slots"), SHAPES)
def test_packed_rows_hold_a_batch(num_dense, num_slots, leading):
    """By the bit, also as a jitted function has them; on the host the columns are views."""
    batch = some_batch(num_dense, num_slots, *leading)
    rows = packed.packed(batch)
    assert rows.words.shape == (*leading, packed.row_bytes(num_dense, num_slots) // 4)
    compiled = jax.jit(lambda rows: rows.batch)(rows)
    for found in (rows.batch, compiled):
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(batch)]
        jax.tree.map(np.testing.assert_array_equal, as_bits(found), as_bits(batch))
    assert all(np.shares_memory(column, rows.words) for column in jax.tree.leaves(rows.batch) if column.size)


@pytest.mark.parametrize(("num_dense", "num_slots"), SHAPES)
def test_rows_are_taken_by_their_positions_and_padding_by_others(num_dense, num_slots):
    rows = packed.packed(some_batch(num_dense, num_slots, 6))
    order = np.array([5, 0, 6, 5, 2**32 - 1, 3], np.uint32)
    wanted = np.array([rows.words[i] if i < 6 else packed.padding(num_dense, num_slots) for i in order])
    on_device = jax.jit(lambda rows, order: packed.taken(jnp, rows, order))(rows, order)
    for found in (packed.taken(np, rows, order), on_device):
        np.testing.assert_array_equal(found.words, wanted)
        columns = jax.tree.map(lambda column: np.asarray(column)[[2, 4]], found.batch)
        jax.tree.map(lambda column, filler: np.testing.assert_array_equal(column, filler), columns, PADDING)


def test_rows_in_memory_are_padding_unless_they_need_not_be():
    asked = []

    def allocate(shape, dtype):
        asked.append((shape, dtype))
        return np.full(shape, 7, dtype)

    filled, left = (packed.empty(2, 3, 4, allocate, padded=padded) for padded in (True, False))
    assert asked == [((4, 7), np.int32)] * 2 and (left.words == 7).all()
    jax.tree.map(lambda column, filler: np.testing.assert_array_equal(column, filler), filled.batch, PADDING)


def test_a_row_in_tiles_takes_whole_ones():
    """Of 8 words, or of as many as a power of two has where a row has fewer."""
    assert [packed.row_bytes(13, 26, tiled) for tiled in (False, True)] == [164, 192]
    assert [packed.row_bytes(n, 1, tiled=True) // 4 for n in (0, 1, 2, 5, 6)] == [4, 4, 8, 8, 16]
