"""Training and serving see one thing in a raw row: the same ids, the same dense values, the same probability."""

import functools
import json
import time
import tracemalloc

import numpy as np
import pytest

from dlrm_jax.api import exporting
from dlrm_jax.api.trained import open_stored
from dlrm_jax.config import LossConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.prepared import open_prepared, read_schema
from dlrm_jax.data.read.raw_values import read_vocabulary
from dlrm_jax.data.schema.schema import Dense, Sparse, Split
from dlrm_jax.data.values.hashing import hash_text
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact import raw_bags
from dlrm_jax.serving.artifact.errors import BadRequest, TooLate, shown
from dlrm_jax.serving.artifact.export import export_model, of_arrays
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.raw_values import dense_of, with_points
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.serving.http import protocol
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.loop import train_and_evaluate
from dlrm_jax.training.run_config import ModelOptions, RunConfig
from tests.helpers import optimizer, tiny_model
from tests.prepared_helpers import prepare_text, rows_of, schema
from tests.serving.export_test import in_training
from tests.serving_helpers import lively_state, random_dataset

DENSE = (
    Dense("plain"),
    Dense("log", column="count", transform="log1p", missing="fill", fill=3),
    Dense("nvidia", column="count", transform="nvidia_log", fill=-2),
    Dense("torchrec", column="count", transform="torchrec_log"),
    Dense("standard", column="plain", transform="standardise", embed=True),
    Dense("mean", column="count", missing="mean", transform="log1p"),
)
SPARSE = (
    Sparse("colour", min_count=2, oov=True, order="frequency"),
    Sparse("rare", column="colour", table="kept", min_count=3),
    Sparse("again", column="other", table="kept", min_count=3),
    Sparse("filled", column="colour", table="filled", missing="fill", fill="none"),
    Sparse("hex", type="hex", modulo=7, missing="fill", fill="0"),
    Sparse("wide", column="hex", type="hex"),
    Sparse("hashed", column="colour", ids="hash", size=11),
    Sparse("number", column="slot", type="int", ids="hash", size=5),
    Sparse("slot", type="int", ids="raw"),
    Sparse("history", separator="|", hotness=3, pooling="mean"),
    Sparse("either", column="history", separator="|", hotness=2, table="history_filled", missing="fill", fill="ü"),
    Sparse("squared", column="count", buckets="log_squared", missing="fill", fill="0", min_count=2, oov=True),
    Sparse("quarter", column="count", buckets="quantile", size=4),
    Sparse("weekday", column="when", part="weekday", time_format="%y%m%d%H"),
    Sparse("crossed", cross=("slot", "squared", "wide", "weekday")),
    Sparse("crossed_hash", cross=("again", "slot"), ids="hash", size=13, missing="fill", fill="gap"),
)
COLOURS = ["red", "green", "", "blue", "red", "ünïcode ✓", "green", "black", "a rather long name of a colour"]


def log_rows(count: int = 90) -> list[dict]:
    """Raw rows as a log has them: text, with gaps."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        bag = rng.choice(["a", "b", "c", "d", "", "e f"], rng.integers(0, 6))
        rows.append(
            {
                "label": str(i % 2),
                "plain": "" if i % 9 == 0 else f"{rng.normal():.6g}",
                "count": "" if i % 7 == 0 else str(int(rng.integers(-1, 5000))),
                "colour": COLOURS[int(rng.integers(len(COLOURS)))],
                "other": COLOURS[int(rng.integers(3))],
                "hex": "" if i % 11 == 0 else f"{int(rng.integers(2**62)) * 4 + 3:016x}",
                "slot": str(int(rng.integers(6))),
                "history": "|".join(bag),
                "when": "" if i % 13 == 0 else f"1410{10 + i % 20}{i % 24:02d}",
            }
        )
    rows[5]["colour"] = "seen once"
    return rows


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(the log's rows, the prepared dataset's directory, a model exported from it)."""
    directory = tmp_path_factory.mktemp("prepared")
    rows = log_rows()
    of = schema(dense=DENSE, sparse=SPARSE, split=Split("order", val=0, test=0))
    text = "".join(",".join(values) + "\n" for values in [list(rows[0]), *(list(row.values()) for row in rows)])
    output = prepare_text(directory, text, of)
    dataset = open_prepared(output)
    model = ModelOptions(embedding_dim=4, bottom_mlp=(4,), top_mlp=(8, 1)).build(dataset)
    assert model.embedded == (4,) and not model.embed_numbers
    state = lively_state(model)
    tables = {name: np.asarray(table) for name, table in named_tables(model, state.tables)}
    export_model(
        directory / "model",
        model,
        LossConfig(),
        state.dense_params,
        of_arrays(tables),
        dataset,
        "float32",
        evaluated=(),
    )
    return rows, output, directory / "model", model, state


def test_a_log_without_numbers_is_prepared_trained_exported_and_served(tmp_path):
    rows = [{"label": str(i % 2), "colour": COLOURS[i % 3], "other": COLOURS[i % 5 % 2]} for i in range(60)]
    text = "label,colour,other\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    of = schema(dense=(), sparse=(Sparse("colour"), Sparse("other")), split=Split("order", val=0.2, test=0.2))
    data = DataConfig("planted", data_dir=str(prepare_text(tmp_path, text, of)))
    model = ModelOptions(embedding_dim=4, bottom_mlp=(64, 16), top_mlp=(4, 1))
    config = RunConfig(data, model, LossConfig(), optimizer(), batch_size=8, num_micro_batches=2, eval_batch_size=16)
    result = train_and_evaluate(config, tmp_path / "run")
    assert result["step"] == 5 and 0 < result["test"]["log_loss"] < 2
    run = open_stored(tmp_path / "run", "latest")
    assert run.model.num_dense == 0 and run.model.bottom_mlp == () and set(run.dense_params) == {"top_mlp"}
    pieces = functools.partial(exporting.pieces, run)
    where = (tmp_path / "model", run.model, LossConfig(), run.dense_params, pieces, run.dataset)
    version = export_model(*where, evaluated=("test",))
    served = load(tmp_path / "model")
    assert served.self_check() < 1e-6 and served.signature.dense_names == ()
    assert version.read_json("metrics.json")["test"]["log_loss"] == pytest.approx(result["test"]["log_loss"], abs=1e-6)
    ids = rows_of(tmp_path / "out", "test").ids_RxK
    want = served.predict(np.zeros((len(ids), 0), np.float32), ids)
    np.testing.assert_array_equal(served.predict_rows(without_label(rows[-len(ids) :])), want)
    # The protocol knows no tensor of no columns, but takes one.
    assert [tensor["name"] for tensor in protocol.model_metadata(served)["inputs"]] == ["ids"]
    tensors = [
        {"name": "ids", "datatype": "INT32", "shape": list(ids.shape), "data": ids.tolist()},
        {"name": "dense", "datatype": "FP32", "shape": [len(ids), 0], "data": []},
    ]
    for inputs in (tensors, tensors[:1]):
        _, *arrays = protocol.parse_infer(json.dumps({"inputs": inputs}).encode(), None, 100, has_numbers=False)
        np.testing.assert_array_equal(served.predict(*served.checked(*arrays)), want)
    with pytest.raises(BadRequest, match="tensor 'dense' is missing"):
        protocol.parse_infer(json.dumps({"inputs": tensors[:1]}).encode(), None, 100)
    native = NativeCpu(version).run(np.zeros((len(ids), 0), np.float32), ids)
    np.testing.assert_allclose(native[0], want, atol=1e-6)


def without_label(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "label"} for row in rows]


def test_ids_and_dense_values_are_those_of_training(prepared):
    rows, output, model_dir, *_ = prepared
    trained = rows_of(output)
    dense_BxN, ids_BxK, unknown = load(model_dir).reader.read(without_label(rows))
    np.testing.assert_array_equal(ids_BxK, trained.ids_RxK)
    np.testing.assert_array_equal(dense_BxN.view(np.uint32), trained.dense_RxN.view(np.uint32))
    assert unknown["colour"] == 1 and set(unknown) == {"colour", "rare", "squared"}
    for row, ids, dense in zip(without_label(rows), trained.ids_RxK, trained.dense_RxN, strict=True):
        one_dense, one_ids, _ = load_once(model_dir).reader.read([row])
        np.testing.assert_array_equal(one_ids[0], ids)
        np.testing.assert_array_equal(one_dense[0].view(np.uint32), dense.view(np.uint32))


_LOADED: dict = {}


def load_once(model_dir):
    if model_dir not in _LOADED:
        _LOADED[model_dir] = load(model_dir)
    return _LOADED[model_dir]


def test_probabilities_are_equal_to_the_bit_at_one_batch_size(prepared):
    rows, output, model_dir, model, state = prepared
    trained = rows_of(output)
    ones = np.ones(64, np.float32)
    batch = Batch(trained.dense_RxN[:64], trained.ids_RxK[:64], trained.label_R[:64], ones)
    want = in_training(model, state, batch)
    servable = load_once(model_dir)
    np.testing.assert_array_equal(servable.predict_rows(without_label(rows[:64])), want)
    for size in (1, 5, 33):
        got = servable.predict_rows(without_label(rows[:size]))
        np.testing.assert_allclose(got, want[:size], atol=1e-6)


def test_shared_values_are_those_of_every_row(prepared):
    rows, _, model_dir, *_ = prepared
    reader = load_once(model_dir).reader
    user = {name: rows[1][name] for name in ("plain", "colour", "history")}
    candidates = [{name: value for name, value in row.items() if name not in user} for row in without_label(rows[:20])]
    got = reader.read(candidates, user)
    want = reader.read([candidate | user for candidate in candidates])
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_values_that_the_log_did_not_have_are_unknown_and_counted(prepared):
    rows, _, model_dir, *_ = prepared
    row = without_label(rows)[1] | {"colour": "mauve", "history": ["a", "never", None, ""]}
    servable = load_once(model_dir)
    _, ids, unknown = servable.reader.read([row, row])
    starts = np.cumsum([0] + [feature.hotness for feature in servable.signature.features])
    assert ids[0, 0] == 0 and ids[0, starts[1]] == -1 and ids[0, starts[9] + 1] == -1 and ids[0, starts[9]] >= 0
    assert unknown == {"colour": 2, "rare": 2, "filled": 2, "history": 2, "either": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": ...}, "row 0: feature 'colour' is missing"),
        ({"taste": 1}, "row 0: unknown feature 'taste'; known are plain"),
        ({"plain": "x"}, "row 0, feature 'plain': 'x' is not a number"),
        ({"plain": [1]}, r"feature 'plain': \[1\] is not a number"),
        ({"plain": float("nan")}, "feature 'plain': NaN"),
        ({"plain": "1e400"}, "feature 'plain': '1e400' is not a finite number"),
        ({"plain": 10**400}, "feature 'plain': 10000"),
        ({"plain": "1e39"}, "feature 'plain'"),
        ({"count": -5}, "feature 'count': -5 has no finite float32 under nvidia_log"),
        ({"hex": "xyz"}, "feature 'hex': 'xyz' is not a hexadecimal number"),
        ({"hex": 12}, "feature 'hex': 12 is not a hexadecimal number, as text"),
        ({"slot": "1.5"}, "feature 'slot': '1.5' is not a whole number"),
        ({"slot": 6}, "feature 'slot': 6 is outside the table's ids 0 to 5"),
        ({"slot": -1}, "feature 'slot': -1 is outside"),
        ({"slot": 2**70}, "feature 'slot': 1180591620717411303424 is not a whole number of 64 bits"),
        ({"colour": 1.5}, "feature 'colour': 1.5 is neither text nor a whole number"),
        ({"colour": {"a": 1}}, "feature 'colour': {'a': 1} is neither"),
        ({"colour": "\ud800"}, "is not valid Unicode"),
        ({"colour": [["a"]]}, r"feature 'colour': \['a'\] is neither"),
        ({"history": ["a"] * 1001}, "1001 values in one bag; at most 1000"),
    ],
)
def test_what_cannot_be_used_is_named(prepared, change, words):
    rows, _, model_dir, *_ = prepared
    row = {name: value for name, value in (without_label(rows)[1] | change).items() if value is not ...}
    with pytest.raises(BadRequest, match=words):
        load_once(model_dir).reader.read([row])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"history": "|" * 3000}, "3001 values in one bag; at most 1000"),
        ({"history": [{}] * 3000}, "3000 values in one bag; at most 1000"),
        ({"history": ["a" * 40_000] * 3}, "has 120000 characters; at most 65536"),
        ({"colour": "u" * 70_000}, "'u+...u+' has 70000 characters; at most 65536"),
        ({"plain": "1" * 70_000}, "has 70000 characters"),
        ({"slot": "0" * 70_000 + "x"}, "has 70000 characters|has 70001 characters"),
    ],
)
def test_bounds_come_before_any_value_is_read(prepared, change, words, monkeypatch):
    def read(*_):
        raise AssertionError("a value was read")

    rows, _, model_dir, *_ = prepared
    reader = load_once(model_dir).reader
    row = without_label(rows)[1] | change
    for function in ("raw_bags.hash_text", "raw_bags._bytes_of", "one_text.integer", "one_text.number"):
        module = "data.values" if function.startswith("one_text") else "serving.artifact"
        monkeypatch.setattr(f"dlrm_jax.{module}.{function}", read)
    row = {name: value if name in change else None for name, value in row.items()}
    with pytest.raises(BadRequest, match=words):
        reader.read([row])


def test_a_text_that_is_longer_than_all_of_a_vocabulary_is_unknown_without_being_hashed(prepared, monkeypatch):
    _, output, model_dir, *_ = prepared
    schema, signature = read_schema(output), load_once(model_dir).signature
    texts = [s for s in schema.sparse if s.ids == "vocabulary" and s.value_type == "string"]
    for table in {sparse.table_name for sparse in texts}:
        known = read_vocabulary(output, schema, table).to_pylist()
        assert signature.longest[table] == max((len(text.encode()) for text in known), default=0)
    assert signature.longest.keys() == {sparse.table_name for sparse in texts}

    reader, hashed = load(model_dir).reader, []
    monkeypatch.setattr(
        raw_bags, "hash_text", lambda text, seed=0: hashed.append((text, seed)) or hash_text(text, seed)
    )
    most = signature.longest["colour"]
    known = next(text for text in read_vocabulary(output, schema, "colour").to_pylist() if len(text.encode()) == most)
    assert reader.ids("colour", known)[0] >= 0 and hashed == [(known.encode(), 0), (known.encode(), 1)]
    hashed.clear()
    assert reader.ids("colour", "é" * (most // 2 + 1)) == [raw_bags.UNKNOWN] and not hashed
    # One that is not there is hashed once, as its second hash would be compared with nothing.
    assert reader.ids("colour", "~" * most) == [raw_bags.UNKNOWN] and hashed == [(b"~" * most, 0)]


class Unhashed(str):
    def __hash__(self):
        raise AssertionError("all of a long text was read to find it in a table")


@pytest.mark.parametrize("feature", ["colour", "hashed", "history"])
def test_no_table_is_asked_for_a_long_text(prepared, feature):
    reader = load(prepared[2]).reader
    assert reader.ids(feature, Unhashed("~" * 1000)) == reader.ids(feature, "~" * 1000)
    nulls = frozenset(["", "null"])
    for read in (dense_of(Dense("a"), nulls), with_points(dense_of(Dense("a"), nulls), ",", nulls)):
        assert read(Unhashed("1" * 30)) == float("1" * 30) and np.isnan(read("null"))


def test_long_values_are_not_kept_and_reading_ends_at_its_deadline(prepared):
    rows, _, model_dir, *_ = prepared
    reader, row = load_once(model_dir).reader, without_label(rows)[1]
    tracemalloc.start()
    try:
        reader.read([row | {"colour": f"{i:010000d}"} for i in range(30)])
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    with pytest.raises(TooLate, match="not read in time"):
        reader.read([row], deadline=time.monotonic())


@pytest.mark.parametrize("value", [[[]] * 10**5, "x" * 10**6, dict.fromkeys(range(10**5))])
def test_a_value_is_cut_before_it_is_written(value):
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert len(shown(value)) <= 80 and len(shown(deep)) <= 80 and len(shown({"a": value})) <= 80
    tracemalloc.start()
    try:
        shown([value])
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


def test_shared_values_must_not_be_given_twice(prepared):
    rows, _, model_dir, *_ = prepared
    row = without_label(rows)[1]
    with pytest.raises(BadRequest, match="row 0: feature 'plain' is given here and in shared"):
        load_once(model_dir).reader.read([row], {"plain": "1"})
    with pytest.raises(BadRequest, match="shared: unknown feature 'taste'"):
        load_once(model_dir).reader.read([row], {"taste": "1"})


def test_models_of_numbers_take_numbers():
    model = tiny_model()
    from dlrm_jax.serving.artifact.export import make_signature

    reader = Reader(make_signature(model, random_dataset(model), "float32"), {})
    row = {"x0": 1, "x1": 2.5, "x2": -3, "user": 10, "item": 6, "history": [1, 2], "flag": None}
    dense, ids, unknown = reader.read([row])
    assert dense.tolist() == [[1, 2.5, -3]] and ids.tolist() == [[10, 6, 1, 2, -1, -1, -1]] and unknown == {}
    for change, words in (
        ({"x0": "1"}, "row 0, feature 'x0': '1' is not a number"),
        ({"x0": None}, "feature 'x0': None is not a number"),
        ({"x0": 1e39}, "feature 'x0': 1e\\+39 has no finite float32"),
        ({"x0": True}, "feature 'x0': True is not a number"),
        ({"user": 11}, "feature 'user': id 11 is outside its table of 11 rows"),
        ({"user": 1.0}, "feature 'user': 1.0 is not an id"),
        ({"history": [1, 2, 3, 4]}, "feature 'history': 4 ids in one bag, but its hotness is 3"),
        ({"history": [1, None]}, "feature 'history': None is not an id"),
    ):
        with pytest.raises(BadRequest, match=words):
            reader.read([row | change])
