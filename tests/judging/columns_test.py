"""Tests `dlrm_jax/judging/columns.py`: which slice a row is in, and what it is called."""

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.schema.schema import Dense, Sparse
from dlrm_jax.data.values.transforms import TRANSFORMS
from dlrm_jax.judging.columns import read_columns, require_columns, slices_of
from tests.judging.logs import log_of, scored
from tests.prepared_helpers import prepare_text, schema

DATA = log_of(scored(0))


def sliced(name: str, at_most: int = 20, dataset=DATA, split="test", data_dir=""):
    return slices_of(read_columns(dataset, dataset.splits[split], [name])[name], at_most, dataset, data_dir)


def test_rare_values_are_taken_together():
    user_R = DATA.splits["test"].ids_RxK[:, 0]
    values, counts = np.unique(user_R, return_counts=True)
    slices = sliced("user", 6)
    most = [str(values[i]) for i in np.argsort(-counts, kind="stable")[:5]]
    assert slices.texts == (*most, f"({len(values) - 5} other values)")
    for i, text in enumerate(most):
        np.testing.assert_array_equal(slices.number_R == i, user_R == int(text))
    assert (slices.number_R == 5).sum() == len(user_R) - np.sort(counts)[-5:].sum()
    assert len(sliced("user", len(values)).texts) == len(values), "none is rare where all have room"


def test_a_bag_counts_by_its_first_id():
    bag_Rx3 = DATA.splits["test"].ids_RxK[:, 1:]
    slices = sliced("history")
    assert set(slices.texts) == {"0", "1", "2", "3", "4", "(empty)"}
    np.testing.assert_array_equal(np.array(slices.texts)[slices.number_R] == "3", bag_Rx3[:, 0] == 3)
    np.testing.assert_array_equal(np.array(slices.texts)[slices.number_R] == "(empty)", (bag_Rx3 < 0).all(axis=1))


def test_numbers_are_their_values_or_buckets_of_equally_many_rows():
    hour_R, price_R = DATA.splits["test"].dense_RxN.T
    slices = sliced("hour")
    assert slices.texts == ("0", "1", "2", "3", "4", "5")
    np.testing.assert_array_equal(slices.number_R, hour_R)
    slices = sliced("price")
    assert np.bincount(slices.number_R).tolist() == [40] * 10
    for i in range(10):
        low, high = (float(slices.texts[i].split(between)[side]) for between, side in ((" ", 0), (" ", -1)))
        inside = price_R[slices.number_R == i]
        assert low * 0.9999 <= inside.min() and inside.max() <= high * 1.0001


def test_values_are_shown_as_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(TRANSFORMS, "_known", TRANSFORMS.all() | {"root": np.sqrt})
    rows = [f"{i % 2},{i + 3},{colour},{i % 3:x}f\n" for i, colour in enumerate(["red", "green", "", "blue", "red"])]
    sparse = (Sparse("c", min_count=2, oov=True), Sparse("h", type="hex"), Sparse("b", column="c", ids="hash", size=3))
    numbers = ("none", "log1p", "nvidia_log", "torchrec_log", "standardise", "root")
    of = schema(sparse=sparse, dense=tuple(Dense(kind, "x", kind) for kind in numbers))
    output = prepare_text(tmp_path, "label,x,c,h\n" + "".join(rows), of)
    dataset = open_prepared(output)
    shown = {name: sliced(name, 20, dataset, "train", str(output)) for name in ("c", "h", "b", *numbers)}
    texts = {name: [slices.texts[i] for i in slices.number_R] for name, slices in shown.items()}
    assert texts["c"] == ["red", "(infrequent)", "(empty)", "(infrequent)", "red"]
    assert texts["h"] == ["f", "1f", "2f", "f", "1f"]
    assert set(texts["b"]) <= {"0", "1", "2", "(empty)"}, "a hash has no way back"
    for kind in numbers[:-1]:
        assert shown[kind].name == kind and texts[kind] == ["3", "4", "5", "6", "7"]
    assert sliced("log1p", 2, dataset, "train", str(output)).texts == ("3 to below 5", "5 to 7")
    assert shown["root"].name == "root (root)" and texts["root"][1] == "2", "nobody knows the way back"


def test_a_column_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match="--group_by=session: small has no column 'session', it has user, history, "):
        require_columns(DATA, {"group_by": ["session"]})
