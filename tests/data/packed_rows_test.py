"""Tests `packed_rows.py`: packed rows hold a batch's bits, on the host and in a jitted step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.data import packed_rows
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.packed_rows import PADDING

SHAPES = [(13, 26), (0, 1), (1, 0), (3, 7), (5, 9)]


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
    """By the bit, with and without what fills lines, also in a jitted function; on the host the columns are views."""
    batch = some_batch(num_dense, num_slots, *leading)
    rows = packed_rows.of_batch(batch)
    short = rows.without_gaps()
    assert rows.words.shape == (*leading, packed_rows.row_words(num_dense, num_slots))
    assert short.words.shape == (*leading, packed_rows.row_bytes(num_dense, num_slots) // 4)
    for found in (rows.batch, short.batch, jax.jit(lambda rows: rows.batch)(rows)):
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(batch)]
        jax.tree.map(np.testing.assert_array_equal, as_bits(found), as_bits(batch))
    assert all(np.shares_memory(column, rows.words) for column in jax.tree.leaves(rows.batch) if column.size)


@pytest.mark.parametrize(("num_dense", "num_slots"), SHAPES)
def test_rows_are_taken_by_their_positions_and_padding_by_others(num_dense, num_slots):
    rows = packed_rows.of_batch(some_batch(num_dense, num_slots, 6)).without_gaps()
    order = np.array([5, 0, 6, 5, 2**32 - 1, 3], np.uint32)
    wanted = np.array([rows.words[i] if i < 6 else rows.padding for i in order])
    on_device = jax.jit(lambda rows, order: packed_rows.taken(jnp, rows, order))(rows, order)
    for found in (packed_rows.taken(np, rows, order), on_device):
        np.testing.assert_array_equal(found.words, wanted)
        columns = jax.tree.map(lambda column: np.asarray(column)[[2, 4]], found.batch)
        jax.tree.map(lambda column, filler: np.testing.assert_array_equal(column, filler), columns, PADDING)


def test_rows_that_travel_fill_lines_where_that_is_a_quarter_more_at_most():
    """Of 16 words; rows that stay are as long as they are, and on a TPU whole tiles of 8 words, or of 4."""
    assert [packed_rows.row_words(n, 1) for n in (13, 10, 9, 27, 38, 26)] == [16, 16, 12, 32, 48, 32]
    assert [packed_rows.row_words(n, 26) for n in (13, 20, 9)] == [48, 48, 37]
    assert [packed_rows.row_bytes(13, 26, tiled) for tiled in (False, True)] == [164, 192]
    assert [packed_rows.row_bytes(n, 1, tiled=True) // 4 for n in (0, 1, 2, 5, 6)] == [4, 4, 8, 8, 16]
