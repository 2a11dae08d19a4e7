"""Progressive validation: what is scored when, that a run that is killed goes on to the same bits, the refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import ConfigError, TableConfig
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.data.read.periods import between, periods_of, rows_of_period
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.schema.schema import Sparse, Split
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.judging import by_period
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import loop, online
from dlrm_jax.training.evicting import Eviction
from dlrm_jax.training.forgetting import make_decay
from dlrm_jax.training.online import validate_progressively
from dlrm_jax.training.periods import OnlineOptions
from dlrm_jax.training.placed import Placed, on_one_device
from tests.helpers import optimizer, tiny_model
from tests.placement_helpers import by_name, slots_by_name
from tests.prepared_helpers import csv_rows, prepare_text, schema
from tests.training.resume_test import CONFIG, assert_same_bits, final_state

DRIFTING = dataclasses.replace(CONFIG, data=DataConfig(num_examples=1200, num_periods=4, drift=0.3), log_every=2)
OPTIONS = OnlineOptions(frozen_after=2, retrain=1, decay_sums=0.5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, validate_progressively(DRIFTING, OPTIONS, workdir)


def test_each_model_scores_a_period_before_it_learns_from_it(whole, tmp_path):
    workdir, result = whole
    periods, dataset = result["periods"], load_dataset(DRIFTING.data)
    assert [sorted(set(one) & set(online.MODELS)) for one in periods] == [
        ["living", "optimum"],
        ["living", "optimum", "retrained"],
        *[["frozen", "living", "optimum", "retrained"]] * 2,
    ]
    assert all(one["rows"] == one["living"]["num_samples"] == 300 for one in periods)
    assert periods[2]["frozen"] == periods[2]["living"] and periods[3]["frozen"] != periods[3]["living"]
    assert periods[3]["optimum"] == dataset.optimum["period_03"]
    assert int(final_state(workdir, DRIFTING).step) == 4 * 5
    assert 0.4 < periods[0]["living"]["auc"] < 0.6, "nothing was learned yet"
    table = by_period.table(periods).splitlines()
    assert table[-1].split()[:4] == ["mean", "of", "2", "600"] and len(table) == 6
    by_period.draw(periods, tmp_path / "online.png")
    assert (tmp_path / "online.png").stat().st_size > 10_000


@pytest.mark.parametrize("killed_at", [("living", 2), ("frozen", 3), ("retrained", 2)])
@pytest.mark.sample(1)
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, killed_at):
    score = online._score

    def dying(run, scores, model, state, number):
        if (model, number) == killed_at:
            raise KeyboardInterrupt
        score(run, scores, model, state, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(online, "_score", dying)
        validate_progressively(DRIFTING, OPTIONS, tmp_path)
    assert validate_progressively(DRIFTING, OPTIONS, tmp_path) == whole[1]
    assert json.loads((tmp_path / "online.json").read_text()) == json.loads((whole[0] / "online.json").read_text())
    assert_same_bits(final_state(tmp_path, DRIFTING), final_state(whole[0], DRIFTING))


def test_what_is_another_run_is_refused(whole, tmp_path):
    workdir, _ = whole
    other = dataclasses.replace(DRIFTING, batch_size=32)
    with pytest.raises(
        ConfigError, match=r"--init_from=\S+ takes its model\) or the same settings.*batch_size: 32 != 64"
    ):
        validate_progressively(other, OPTIONS, workdir)
    with pytest.raises(ConfigError, match="frozen_after: 1 != 2"):
        validate_progressively(DRIFTING, OnlineOptions(), workdir)
    with pytest.raises(
        ConfigError, match=r"holds a run of dlrm_jax\.online; choose another --workdir, or --init_from it"
    ):
        loop.train_and_evaluate(DRIFTING, workdir)
    with pytest.raises(ConfigError, match="dataset 'planted' is not split by periods"):
        validate_progressively(CONFIG, OPTIONS, tmp_path)
    with pytest.raises(ConfigError, match="--frozen_after=4; behind it must be one of 4 periods"):
        validate_progressively(DRIFTING, OnlineOptions(frozen_after=4), tmp_path)
    with pytest.raises(ConfigError, match="there is one period, period_03: it takes two"):
        validate_progressively(DRIFTING, OnlineOptions("period_03:"), tmp_path)
    with pytest.raises(ConfigError, match="--retrain=-1; it must not be negative"):
        OnlineOptions(retrain=-1)


@pytest.mark.parametrize("bounded", [0.0, 5.0])
def test_sums_of_adagrad_decay_and_nothing_else_does(bounded):
    model = tiny_model(learned_pooling=True)
    settings = dataclasses.replace(optimizer("rowwise_adagrad", "adam"), clip_value=bounded)
    placed = on_one_device(model, settings)
    ones = jax.tree.map(jnp.ones_like, placed.init_state(0))
    (stack,) = placed.stacks
    for name, kept in make_decay(placed, 0.25)(ones).table_opt_state.items():
        assert (np.asarray(kept["sum"]) == 0.25).all(), name
    ones = jax.tree.map(jnp.ones_like, placed.init_state(0))
    rest = make_decay(placed, 0.25)(ones).replace(table_opt_state={})
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(rest))
    dense = on_one_device(model, optimizer("ftrl", "adagrad"))
    ones = jax.tree.map(jnp.ones_like, dense.init_state(0))
    decayed = make_decay(dense, 0.25)(ones)
    assert {float(leaf.min()) for leaf in jax.tree.leaves(decayed.dense_opt_state)} == {0.25}
    assert (np.asarray(decayed.table_opt_state[stack.name]["sum"]) == 1).all(), "FTRL's are understood by its others"
    with pytest.raises(ConfigError, match=r"--decay_sums=0\.25 has no effect: neither tables nor dense"):
        make_decay(on_one_device(model, optimizer("adam", "adam")), 0.25)
    with pytest.raises(ConfigError, match=r"--decay_sums=1\.5; it must be above 0, and 1 at most"):
        OnlineOptions(decay_sums=1.5)


def rows_of(*values: str) -> list[tuple]:
    """Rows of one value each, a day after the other, three of each value."""
    return [(i % 2, day, value) for day, of_day in enumerate(values) for value in of_day for i in range(3)]


@pytest.mark.parametrize(("shards", "sharding"), [(1, "data_parallel"), (3, "row_wise")])
def test_rows_that_nobody_asked_for_become_the_out_of_vocabulary_row(tmp_path, shards, sharding):
    of = schema(sparse=(Sparse("c", oov=True),), timestamp="x", split=Split("time", period="1", val=1, test=1))
    dataset = open_prepared(prepare_text(tmp_path, csv_rows(rows_of("abc", "ab", "adc", "ad", "b")), of))
    shape, periods = MeshShape(1, shards), periods_of(dataset)
    model = tiny_model(num_dense=1, tables=(TableConfig("c", 5, 4),), features=dataset.features)
    assert dataset.table_sizes == {"c": 5} and len(periods) == 5, "out of vocabulary, a, b, c, d"
    placed = Placed(model, optimizer("rowwise_adagrad"), make_plan(model, shape, sharding), make_mesh(shape))
    state = placed.init_state(0)
    ones = jax.tree.map(jnp.ones_like, state.table_opt_state)
    evict = Eviction(placed, dataset, [rows_of_period(dataset, period) for period in periods], 2)
    assert [evict.rows(number).get("c", np.zeros(0)).tolist() for number in range(5)] == [[], [], [], [2], [3]]
    before = by_name(placed, state.tables)["c"]
    after, counts = evict(state.replace(table_opt_state=ones), 3)
    rows, kept = by_name(placed, after.tables)["c"], slots_by_name(placed, after.table_opt_state)["c/sum"]
    np.testing.assert_array_equal(rows, before[[0, 1, 0, 3, 4]])
    assert kept[:, 0].tolist() == [1, 1, 0, 1, 1] and counts == {"c": 1}
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(placed.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    with pytest.raises(ConfigError, match="--evict_after=2: no table of planted has an out-of-vocabulary row"):
        Eviction(placed, load_dataset(DRIFTING.data), [], 2)


def test_periods_are_chosen_by_their_names():
    periods = list(load_dataset(DRIFTING.data).periods)
    assert between(periods, "period_01:period_02") == periods[1:3] and between(periods, ":period_00") == periods[:1]
    for names, words in (
        ("period_01", "give FIRST:LAST"),
        ("period_9:", "there is no period 'period_9'; they are period_00 to period_03"),
        ("period_02:period_01", "period_02 comes after period_01"),
    ):
        with pytest.raises(ConfigError, match=words):
            between(periods, names)
