"""Tests `dlrm_jax/tables/updates.py` and the sorts below it; the rules' own properties are in rules_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.host import formulations
from dlrm_jax.tables.rows import add_rows, set_unique_rows, take_rows
from dlrm_jax.tables.rules import RowwiseAdagrad
from dlrm_jax.tables.updates import SparseGrad, Stored, Update, merge_duplicates

V, D = 6, 3


@pytest.mark.parametrize("size", [1, 2, 20])
def test_merge_duplicates_has_each_id_once_with_the_summed_row(size):
    """Repeated ids, empty slots (-1) and ids beyond the table."""
    rng = np.random.default_rng(3)
    ids, rows = rng.integers(-1, V + 1, size).astype(np.int32), rng.normal(size=(size, D)).astype(np.float32)
    merged = merge_duplicates(SparseGrad(jnp.asarray(ids), jnp.asarray(rows)), V)
    kept = np.asarray(merged.ids_M)
    inside = (ids >= 0) & (ids < V)
    assert sorted(kept[kept < V]) == sorted(set(ids[inside]))
    for row in set(ids[inside]):
        found = np.asarray(merged.rows_MxD)[kept == row]
        np.testing.assert_allclose(found[0], rows[ids == row].sum(axis=0), rtol=1e-5, atol=1e-6)


def test_one_id_in_every_slot_is_squared_after_summing():
    update = Update(RowwiseAdagrad(eps=0.0), jnp.float32(1), jnp.int32(1))
    grad = SparseGrad(jnp.zeros(8, jnp.int32), jnp.ones((8, D)))
    after = jax.jit(update.by_rows)(grad, Stored(jnp.zeros((V, D)), {"sum": jnp.zeros((V, 1))}))
    assert float(after.slots["sum"][0, 0]) == 64.0


@pytest.mark.parametrize("size", [1, 2, 500])
def test_both_sorts_give_equal_ids_in_slot_order(size):
    ids = jnp.asarray(np.random.default_rng(size).integers(0, 2**31 - 1, size) % (2**31 - 1 if size < 500 else 40))
    for ours, theirs in zip(formulations.sort_packed(ids), formulations.sort_pairs(ids), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == np.int32


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("width", [1, 4, 128])
@pytest.mark.sample(2)
def test_rows_that_share_lines_are_read_added_and_replaced_as_plain_ones(width, dtype):
    rng, rows = np.random.default_rng(width), 256
    plain = jnp.asarray(rng.integers(-9, 9, (rows, width)), dtype)
    packed = plain.reshape(-1, 128)
    ids = jnp.asarray([3, 0, 255, 4, -1, rows], jnp.int32)
    new = jnp.asarray(rng.integers(-9, 9, (6, width)), dtype)
    inside = np.array([3, 0, 255, 4])
    np.testing.assert_array_equal(take_rows(packed, ids[:4], width), plain[inside])
    want = np.array(plain)
    want[inside] += new[:4]
    np.testing.assert_array_equal(add_rows(packed, ids, new).reshape(rows, width), want)
    want = np.array(plain)
    want[inside] = new[:4]
    for table in (plain, packed):
        np.testing.assert_array_equal(set_unique_rows(table, ids, new).reshape(rows, width), want)
