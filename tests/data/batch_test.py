"""Tests `dlrm_jax/data/batch.py`: ids are checked on the host, in words."""

import numpy as np
import pytest

from dlrm_jax.config import EMPTY_SLOT, ConfigError
from dlrm_jax.data.batch import check_ids, describe_nonfinite, pack_bags
from tests.helpers import random_batch, tiny_model

MODEL = tiny_model()


def ids_with(value: int, row: int = 2, slot: int = 4, dtype: type = np.int64) -> np.ndarray:
    ids = np.zeros((5, MODEL.num_slots), dtype)
    ids[row, slot] = value
    return ids


@pytest.mark.parametrize("value", [7, -2, 2**40])
def test_id_outside_its_table_names_feature_row_value_and_limit(value):
    with pytest.raises(ConfigError) as error:
        check_ids(MODEL, ids_with(value), np.arange(100, 105))
    for words in ("'history'", "row 102", f"id {value} ", "7 rows"):
        assert words in str(error.value)


def test_ids_at_the_limits_pass():
    ids = ids_with(6)
    ids[0, 0] = EMPTY_SLOT
    check_ids(MODEL, ids)


def test_float_ids_are_refused():
    with pytest.raises(ConfigError, match="float32 rounds ids"):
        check_ids(MODEL, ids_with(1, dtype=np.float32))


def test_wrong_number_of_slots_is_refused():
    with pytest.raises(ConfigError, match="expected \\(rows, 7\\)"):
        check_ids(MODEL, np.zeros((5, 6), np.int32))


def test_pack_bags_pads_short_and_empty_bags():
    packed = pack_bags("f", np.array([5, 6, 7]), np.array([2, 0, 1]), hotness=3)
    np.testing.assert_array_equal(packed, [[5, 6, -1], [-1, -1, -1], [7, -1, -1]])


def test_pack_bags_names_the_row_of_a_bag_that_is_too_long():
    with pytest.raises(ConfigError, match="'f', row 1: 3 ids in one bag, but its hotness is 2"):
        pack_bags("f", np.arange(4), np.array([1, 3]), hotness=2)


def test_pack_bags_refuses_lengths_that_do_not_add_up():
    with pytest.raises(ConfigError, match="add up to 3, but there are 4"):
        pack_bags("f", np.arange(4), np.array([1, 2]), hotness=2)


def test_describe_nonfinite_names_the_column():
    batch = random_batch(MODEL, 4)
    assert "no input column" in describe_nonfinite(batch)
    batch.label_B[1] = np.nan
    assert "label is nan in row 1" in describe_nonfinite(batch)
    batch.dense_BxN[3, 2] = np.inf
    assert "'price' is inf in row 3" in describe_nonfinite(batch, ("a", "b", "price"))
