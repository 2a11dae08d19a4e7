"""Runs that begin from another one: its rows and what the optimizer keeps of them, new rows, steps, refusals."""

import dataclasses

import jax
import numpy as np
import pytest

from dlrm_jax.api.exported import open_exported
from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.load import load_dataset
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.read.windows import slice_rows
from dlrm_jax.data.schema.schema import Sparse
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.init import init_tables
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import loop, opening
from dlrm_jax.training.beginning import begin, require_fitting
from dlrm_jax.training.checkpoint import LATEST, Checkpoints
from dlrm_jax.training.known_ids import require_known_ids
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.origin import Origin, open_origin
from dlrm_jax.training.placed import Placed
from tests.helpers import optimizer, tiny_model
from tests.placement_helpers import by_name, slots_by_name
from tests.prepared_helpers import csv_rows, prepare_text, schema
from tests.serving_helpers import export_tiny, lively_state, random_dataset
from tests.training.resume_test import CONFIG

FIRST, BOTH = 8, 15
"""Batches of the first day, and of both: the second day's are fewer."""
DAY = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, norm="top:batch", dropout="top:0.1", table_dtype="bfloat16"),
    optimizer=optimizer("rowwise_adam", "adam", rate=0.01),
    num_steps=0,
    shuffle=False,
    eval_every=100,
    checkpoint_every=5,
)
BOUNDED = dataclasses.replace(DAY.optimizer, table_max_norm=9.0)
NEW = {"user": 7, "country": 50}


@pytest.fixture(scope="module")
def log():
    return load_dataset(CONFIG.data)


def day(log, first: int, last: int, new=()):
    """Batches `first` to `last` of the log, for training alone; `new` ids of some tables are in its last rows."""
    rows = slice_rows(log.splits["train"], first * CONFIG.batch_size, last * CONFIG.batch_size)
    none = slice_rows(rows, 0, 0)
    sizes = {name: size + dict(new).get(name, 0) for name, size in log.table_sizes.items()}
    return dataclasses.replace(log, table_sizes=sizes, splits={"train": rows, "val": none, "test": none}, optimum=None)


@pytest.fixture
def data(monkeypatch):
    """Sets the dataset that runs open."""
    return lambda dataset: monkeypatch.setattr(opening, "load_dataset", lambda *_: dataset)


@pytest.fixture(scope="module")
def first(log, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_dataset", lambda *_: day(log, 0, FIRST))
        loop.train_and_evaluate(DAY, workdir)
    return workdir


def placed_as(config, log, shards: int, sharding: str = "row_wise", new=()) -> Placed:
    shape = MeshShape(1, shards)
    model = config.model.build(day(log, 0, FIRST, new))
    return Placed(model, config.optimizer, make_plan(model, shape, sharding), make_mesh(shape))


def latest(workdir, placed):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(LATEST, placed), checkpoints.record(LATEST)


@pytest.mark.fused
@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.exhaustive), 4])
def test_two_days_one_after_the_other_equal_one_run_over_both(log, data, first, tmp_path, shards):
    """With batch norm, dropout, stochastic rounding and Adam's counts, all of which depend on what came before."""
    run = dataclasses.replace(DAY, sharding=ShardingOptions(mesh=f"model:{shards}", sharding="row_wise"))
    if shards > 1:
        data(day(log, 0, FIRST))
        loop.train_and_evaluate(run, first := tmp_path / "first")
    data(day(log, FIRST, BOTH))
    second = dataclasses.replace(run, init_from=str(first))
    if shards == 1:  # Goes on where it was stopped.
        loop.train_and_evaluate(dataclasses.replace(second, num_steps=3), tmp_path / "second")
    result = loop.train_and_evaluate(second, tmp_path / "second")
    with pytest.raises(ConfigError, match=r"a run that began with --init_from=\S+ --init_steps=keep; leave"):
        loop.train_and_evaluate(dataclasses.replace(second, init_steps="reset"), tmp_path / "second")
    data(day(log, 0, BOTH))
    loop.train_and_evaluate(run, tmp_path / "both")
    placed = placed_as(run, log, shards)
    states = [latest(tmp_path / name, placed)[0] for name in ("second", "both")]
    jax.tree.map(lambda *leaves: np.testing.assert_array_equal(*map(np.asarray, leaves)), *states)
    assert result["step"] == BOTH and latest(tmp_path / "second", placed)[1]["progress"]["begun"]["step"] == FIRST


@pytest.mark.parametrize(("shards", "sharding"), [(1, "data_parallel"), (4, "row_wise"), (4, "column_wise")])
@pytest.mark.sample(2)
def test_new_rows_are_born_as_they_would_have_been_and_old_ones_stay(log, first, tmp_path, shards, sharding, caplog):
    old, _ = latest(first, one := placed_as(DAY, log, 1))
    rows, slots = by_name(one, old.tables), slots_by_name(one, old.table_opt_state)
    placed = placed_as(DAY, log, shards, sharding, NEW.items())
    config = dataclasses.replace(DAY, init_from=str(first), seed=5)  # New rows are drawn by the first run's seed.
    with caplog.at_level("INFO", logger="dlrm_jax"):
        state, begun = begin(config, tmp_path, placed, day(log, FIRST, BOTH, NEW.items()), None)
    assert (int(state.step), begun.step, begun.seed) == (FIRST, FIRST, 0)
    born = dict(named_tables(placed.model, init_tables(placed.model, 0)))
    found, kept = by_name(placed, state.tables), slots_by_name(placed, state.table_opt_state)
    for name, before in rows.items():
        np.testing.assert_array_equal(found[name][: len(before)], before)
        np.testing.assert_array_equal(found[name][len(before) :], np.asarray(born[name])[len(before) :])
        assert len(found[name]) == len(before) + NEW.get(name, 0)
    for name, before in slots.items():
        np.testing.assert_array_equal(kept[name][: len(before)], before)
        assert not kept[name][len(before) :].any()
    jax.tree.map(np.testing.assert_array_equal, state.dense_params, old.dense_params)
    jax.tree.map(np.testing.assert_array_equal, state.dense_opt_state, old.dense_opt_state)
    assert "table user         600 rows   7 rows  taken" in caplog.text


@pytest.mark.parametrize(
    ("changes", "init", "told"),
    [
        ({"optimizer": optimizer("adagrad", "sgd", 0.01)}, {}, "fresh: Adagrad here, RowwiseAdam there"),
        ({"optimizer": BOUNDED}, {"init_steps": "reset"}, "like) counts updates, from 0"),
        ({"model": dataclasses.replace(DAY.model, top_mlp=(9, 1), table_dtype="float32")}, {"init_only": "tables"}, ""),
    ],
)
@pytest.mark.sample(1)
def test_what_does_not_fit_the_optimizer_or_was_not_asked_for_is_fresh(
    log, first, tmp_path, changes, init, told, caplog
):
    config = dataclasses.replace(DAY, init_from=str(first), **changes, **init)
    placed = placed_as(config, log, 1)
    with caplog.at_level("INFO", logger="dlrm_jax"):
        state, begun = begin(config, tmp_path, placed, day(log, FIRST, BOTH), None)
    old, _ = latest(first, one := placed_as(DAY, log, 1))
    for name, rows in by_name(one, old.tables).items():
        np.testing.assert_array_equal(by_name(placed, state.tables)[name].astype(np.float32), rows.astype(np.float32))
    assert told in caplog.text and begun.step == int(state.step) == (0 if init.get("init_steps") else FIRST)
    if told:
        jax.tree.map(np.testing.assert_array_equal, state.dense_params, old.dense_params)
        fresh = placed.init_state(0).table_opt_state
        jax.tree.map(np.testing.assert_array_equal, state.table_opt_state, fresh)
    else:
        fresh = placed.init_state(DAY.seed)
        jax.tree.map(np.testing.assert_array_equal, state.dense_params, fresh.dense_params)
        jax.tree.map(np.testing.assert_array_equal, state.table_opt_state, old.table_opt_state)


def test_what_cannot_be_begun_from_is_refused_in_one_line(log, first, tmp_path):
    wide = dataclasses.replace(DAY.model, embedding_dim=8, bottom_mlp=(8, 8))
    deep = dataclasses.replace(DAY.model, top_mlp=(9, 8, 1))
    (tmp_path / "runs").mkdir()
    (tmp_path / "young" / "checkpoints" / "latest").mkdir(parents=True)
    (tmp_path / "young" / "checkpoints" / "best").mkdir()
    data = day(log, FIRST, BOTH)
    smaller = dataclasses.replace(data, table_sizes={**data.table_sizes, "user": 599})
    renamed = dataclasses.replace(data, schema={"dense": [{"name": "x"}]})
    for of_model, dataset, init_from, words in (
        (wide, data, first, "table 'user' has rows of 4 there and of 8 here; give it that dim: --embedding_dim=4"),
        (deep, data, first, r"another model \(here != there\): top_mlp: .*take its tables alone: --init_only=tables"),
        (DAY.model, smaller, first, "table 'user' has 600 rows there and 599 here; a table can grow, not shrink"),
        (DAY.model, data, tmp_path, "is the run's own workdir; leave it out to go on there"),
        (DAY.model, data, tmp_path / "none", "is no directory; give the workdir of a run"),
        (DAY.model, data, tmp_path / "runs", "holds neither checkpoints of a run nor versions of an exported model"),
        (DAY.model, data, tmp_path / "young", "holds a run without a checkpoint"),
    ):
        config = dataclasses.replace(DAY, model=of_model, init_from=str(init_from))
        shape = MeshShape(1, 1)
        model = of_model.build(dataset)
        placed = Placed(model, config.optimizer, make_plan(model, shape, "data_parallel"), make_mesh(shape))
        with pytest.raises(ConfigError, match=words):
            begin(config, tmp_path, placed, dataset, None)
    origin = dataclasses.replace(open_origin(first, tmp_path, placed, None), schema={"dense": [{"name": "y"}]})
    with pytest.raises(ConfigError, match=r"dense columns.*'x' != 'y'"):
        require_fitting(origin, placed.model, renamed, only_tables=False)


def test_an_exported_model_gives_its_weights_and_nothing_else(tmp_path):
    model = tiny_model(learned_pooling=True)
    export_tiny(tmp_path / "model", model)
    data = random_dataset(model)
    placed = Placed(
        model, optimizer("adagrad", "adam"), make_plan(model, MeshShape(1, 2), "row_wise"), make_mesh(MeshShape(1, 2))
    )
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path / "model"))
    state, begun = begin(config, tmp_path, placed, data, open_exported)
    there, fresh = lively_state(model), placed.init_state(0)
    assert int(state.step) == begun.step == 0
    jax.tree.map(np.testing.assert_array_equal, state.dense_params, there.dense_params)
    jax.tree.map(np.testing.assert_array_equal, state.table_opt_state, fresh.table_opt_state)
    found = by_name(placed, state.tables)
    for name, rows in named_tables(model, there.tables):
        np.testing.assert_array_equal(found[name], rows)
    export_tiny(tmp_path / "model", model, "int8")
    with pytest.raises(
        ConfigError, match=r"version 2 has tables of int8, which nothing is trained on from; export with"
    ):
        begin(config, tmp_path, placed, data, open_exported)


def test_ids_that_stand_for_other_values_are_refused(tmp_path):
    """Prepared by themselves, the next day's rows have ids of their own; extended, those of the day before stay."""
    rows = [(i % 2, i, value) for i, value in enumerate("abcab" * 4)]
    (tmp_path / "first").mkdir()
    first = prepare_text(tmp_path / "first", csv_rows(rows), schema())
    (tmp_path / "second").mkdir()
    second = prepare_text(tmp_path / "second", csv_rows(rows[::-1]), schema())
    hashed = prepare_text(tmp_path, csv_rows(rows), schema(sparse=(Sparse("c", ids="hash", size=9),)))
    one, other, by_hash = map(open_prepared, (first, second, hashed))
    origin = Origin("day 1", tiny_model(), {}, None, schema=one.schema, data=first)
    require_known_ids(origin, one)
    with pytest.raises(ConfigError, match=r"ids of table 'c' stand for other values in .*second.* than in .*first"):
        require_known_ids(origin, other)
    with pytest.raises(ConfigError, match=r"ids are given otherwise .*c.ids: 'hash' != 'vocabulary'"):
        require_known_ids(origin, by_hash)
