"""Tests `feed.py`, `window_step.py`, `stepper.py`: a step by a window is the step of its batch, wherever rows lie."""

import dataclasses
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import LossConfig, TableConfig
from dlrm_jax.data import packed_rows
from dlrm_jax.data.generate import planted, synthetic
from dlrm_jax.data.generate.multi_hot import expand_dataset
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.pipeline import Cut, window_steps
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import feed as feed_module
from dlrm_jax.training import loop
from dlrm_jax.training.feed import Feed, Room, make_feed
from dlrm_jax.training.monitor import Losses
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.step import make_train_step
from dlrm_jax.training.stepper import Stepper, steps_at_once
from dlrm_jax.training.window_step import RECORDED, make_window_step
from tests.batches import train_batches
from tests.helpers import optimizer, random_batch, tiny_model
from tests.training.resume_test import CONFIG, assert_same_bits, final_state

ROWS = 50
EXHAUSTIVE = pytest.mark.exhaustive


def split_of(model, rows: int = ROWS) -> Split:
    batch = random_batch(model, rows)
    return Split(*map(np.asarray, (batch.dense_BxN, batch.ids_BxK, batch.label_B)), np.arange(rows), weight_R=None)


def made_split(model, rows: int = ROWS, seed: int = 0):
    """Rows of a synthetic log of a model's shape, the first four fifths of it and behind them those of val."""
    tables = tuple(model.table(feature.table).num_embeddings for feature in model.features)
    hotness = tuple(feature.hotness for feature in model.features)
    log = synthetic.generate(synthetic.Spec(model.num_dense, tables, hotness), seed, 10 * rows)
    return log.splits["val"]


def plain_steps(placed, split, count: int):
    """The state after `count` steps of batches of 16 rows that come from outside, and each step's loss."""
    step = placed.jit_step(make_train_step(placed.model, LossConfig(), placed.optimizer, ops=placed.ops))
    state, losses = placed.init_state(0), []
    for _, batch in zip(range(count), train_batches(split, 16, 3, 1, multiple=placed.num_devices), strict=False):
        state, step_metrics = step(state, jax.device_put(batch, placed.batch_sharding))
        losses.append(float(step_metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_what_a_batch_is_cut_by_is_of_the_platform_that_a_step_is_compiled_for(platform):
    """On a machine of CPUs a pod's step is compiled for TPUs: it has the barrier that holds there, and no condition."""
    model = tiny_model()
    feed = Feed(split_of(model), Cut(16, 4))
    window = jax.eval_shape(
        feed.transfer, packed_rows.of_batch(jax.tree.map(lambda x: np.stack([x[:16]] * 4), random_batch(model, 16)))
    )
    lowered = jax.jit(feed.batch).trace(window, jnp.int32(0)).lower(lowering_platforms=(platform,)).as_text()
    barrier, condition = "optimization_barrier" in lowered, "compare GE" in lowered
    assert (barrier, condition) == ((False, True) if platform == "cpu" else (True, False))


@pytest.mark.parametrize(
    ("road", "devices"),
    [
        *(("travels", 1), ("resident", 2), ("made", 2)),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in (("travels", 2), ("resident", 1), ("made", 1))),
    ],
)
def test_a_step_by_a_window_has_the_bits_of_a_step_by_its_batch(devices, road):
    """Whichever way its rows get there, that of padding behind the last row of an epoch too."""
    model, shape = tiny_model(), MeshShape(1, devices)
    placed = Placed(model, optimizer("rowwise_adagrad"), make_plan(model, shape, "row_wise"), make_mesh(shape))
    split = made_split(model) if road == "made" else split_of(model)
    wanted, losses = plain_steps(placed, split, 6)
    feed = Feed(split, Cut(16, 4, multiple=devices), placed.mesh, resident=road == "resident", made=road == "made")
    step = make_train_step(model, LossConfig(), placed.optimizer, ops=placed.ops)
    one, both = (placed.jit_window_step(make_window_step(step, feed, n), feed.shardings) for n in (1, 2))
    for steps in ((one,) * 6, (both,) * 3):
        state, found = placed.init_state(0).replace(step=jnp.int32(1)), []
        with feed.train_windows(3, 1, shuffle=True) as windows:
            for i, train_step in enumerate(steps):
                if 6 // len(steps) * i % 4 == 0:
                    _, window = next(windows)
                    record = jnp.full((4, len(RECORDED)), jnp.nan)
                state, record = train_step(state, record, window)
                found.append(np.array(record))
        if steps[0] is one:
            assert_same_bits(state.replace(step=wanted.step), wanted)
            assert [float(record[i % 4, 0]) for i, record in enumerate(found)] == losses
        else:
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
            jax.tree.map(close, state.replace(step=wanted.step), wanted)
        assert int(state.step) == 7 and np.isnan(found[-1][2:, 0]).all()


@pytest.mark.parametrize("count", [1, 3])
def test_a_window_step_holds_one_copy_of_each_table_and_none_of_the_window(count):
    model = tiny_model(tables=tuple(TableConfig(name, 100_000, 4) for name in ("user", "item", "flag")))
    placed, table_bytes = on_one_device(model, optimizer("rowwise_adagrad")), 100_000 * 4 * 4
    feed = Feed(split_of(model, 16 * 4096), Cut(16, 4096), placed.mesh)
    step = make_train_step(model, LossConfig(), placed.optimizer)
    with feed.train_windows(0, 0, shuffle=False) as windows:
        _, window = next(windows)
    jitted = placed.jit_window_step(make_window_step(step, feed, count), feed.shardings)
    record = jax.ShapeDtypeStruct((4096, len(RECORDED)), "float32", sharding=placed.everywhere)
    memory = jitted.lower(placed.abstract_state, record, window).compile().memory_analysis()
    window_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(window))
    assert memory.alias_size_in_bytes > 3 * table_bytes
    assert memory.temp_size_in_bytes < min(table_bytes, window_bytes) / 4


SYNTHETIC = dataclasses.replace(CONFIG, data=DataConfig("synthetic", num_examples=1000, table_sizes=(90, 7, 2**20)))


@pytest.mark.parametrize(
    ("whole", "first", "then"),
    [
        *((CONFIG, "never", "never"), (SYNTHETIC, "always", "auto")),
        *(
            pytest.param(*more, marks=EXHAUSTIVE)
            for more in ((CONFIG, "always", "never"), (SYNTHETIC, "never", "always"))
        ),
    ],
)
def test_where_rows_lie_and_how_windows_are_cut_changes_no_bit_of_a_run(tmp_path, monkeypatch, whole, first, then):
    """Nor of its logged losses, with padding at the end of epochs; a run may go on with another choice.

    By itself planted rows stay, and synthetic ones are made; `never` they travel, and are made.
    """
    loop.train_and_evaluate(whole, tmp_path / "auto")
    monkeypatch.setattr(feed_module, "MOST_STEPS", 7)
    monkeypatch.setattr(feed_module, "window_steps", lambda *args: 3)
    loop.train_and_evaluate(dataclasses.replace(whole, data_on_device=first, num_steps=17), tmp_path / "own")
    loop.train_and_evaluate(dataclasses.replace(whole, data_on_device=then), tmp_path / "own")
    assert_same_bits(final_state(tmp_path / "own", whole), final_state(tmp_path / "auto", whole))
    lines = [
        [(x["step"], x["loss"]) for x in loop.reporting.read_metrics(tmp_path / name) if x["split"] == "train"]
        for name in ("auto", "own")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_the_host_sees_the_rows_that_a_step_makes():
    """Those of a batch, to tell of a NaN, and without padding the ids that steps asked for, to publish their rows."""
    split = made_split(tiny_model())
    feeds = [
        Feed(split, Cut(16, 4)),
        *(Feed(split, Cut(16, 4), resident=stays, made=not stays) for stays in (True, False)),
    ]
    seen = []
    for feed in feeds:
        with feed.train_windows(3, 1, shuffle=True) as windows:
            traveller, window = next(windows)
        batches = [feed.host_batch(traveller, i) for i in range(4)]
        for i, batch in enumerate(batches):
            jax.tree.map(np.testing.assert_array_equal, batch, jax.jit(feed.batch)(window, i + 1))
        ids = feed.host_ids(traveller, 1, 4)
        assert len(ids) == (ROWS - 16 if feed.resident or feed.made else 3 * 16)
        seen.append((batches, ids[ids[:, 0] >= 0]))
    assert traveller.dtype == np.uint32 and (traveller == ROWS).sum() == 16 * 4 - ROWS
    for other in seen[1:]:
        jax.tree.map(np.testing.assert_array_equal, seen[0], other)


def test_a_step_makes_what_it_can_where_nothing_must_stay(monkeypatch):
    """Rows that are made hold their positions on a device, those of a window; bags that the host makes travel."""
    placed = on_one_device(tiny_model(), optimizer())
    monkeypatch.setattr(feed_module, "prediction", lambda *args: types.SimpleNamespace(bytes_held=0))
    log = synthetic.generate(synthetic.Spec(2, (30, 20)), 0, 1000)

    def roads(dataset, split: str = "train") -> dict[str, tuple[bool, bool]]:
        rooms = {c: Room(dataclasses.replace(CONFIG, data_on_device=c), placed) for c in ("auto", "never", "always")}
        feeds = {c: make_feed(placed, dataset, dataset.splits[split], Cut(16), room) for c, room in rooms.items()}
        assert feeds["never"].device_bytes == (
            4 * 64 * 16 if feeds["never"].made else feeds["never"].row_bytes * 64 * 16
        )
        return {choice: (feed.resident, feed.made) for choice, feed in feeds.items()}

    made = {"auto": (False, True), "never": (False, True), "always": (True, False)}
    assert roads(log) == roads(log, "val") == roads(expand_dataset(log, (3, 1), "uniform", virtual=True)) == made
    others = [expand_dataset(log, (3, 1), "uniform", virtual=False), planted.generate(0, 1000)]
    assert [roads(one) for one in others] == 2 * [made | {"auto": (True, False), "never": (False, False)}]
    assert not make_feed(placed, log, log.splits["train"], Cut(16)).made


def test_rows_stay_where_they_fit_into_half_of_what_is_free(monkeypatch):
    model = tiny_model()
    placed = on_one_device(model, optimizer())
    monkeypatch.setattr(feed_module, "prediction", lambda *args: types.SimpleNamespace(bytes_held=1000))
    monkeypatch.setattr(feed_module.memory, "host_available", lambda: 3000 * len(jax.local_devices()))
    room = Room(CONFIG, placed)
    assert not room.keeps(1001) and room.keeps(600) and room.keeps(400) and not room.keeps(1)
    assert not Room(dataclasses.replace(CONFIG, data_on_device="never"), placed).keeps(1)
    always = Room(dataclasses.replace(CONFIG, data_on_device="always"), placed)
    assert always.keeps(1500)
    with pytest.raises(loop.ConfigError, match="--data_on_device=always, beside the model, needs"):
        always.keeps(501)


def test_windows_have_few_batches_where_they_are_large():
    assert window_steps(164, 2048) == 64 and window_steps(164, 65536) == 3 and window_steps(10**6, 65536) == 1
    assert window_steps(164, 16, most=5) == 5


def test_steps_of_a_dispatch_follow_from_the_prediction_but_on_a_cpu(monkeypatch):
    placed = on_one_device(tiny_model(), optimizer())
    cost = types.SimpleNamespace(step_seconds=1.3e-4)
    monkeypatch.setattr("dlrm_jax.training.stepper.prediction", lambda *args: cost)
    assert steps_at_once(CONFIG, placed) == 1
    monkeypatch.setattr("dlrm_jax.training.stepper.jax.default_backend", lambda: "gpu")
    assert steps_at_once(CONFIG, placed) == 8
    cost.step_seconds = 0.1
    assert steps_at_once(CONFIG, placed) == 1
    assert steps_at_once(dataclasses.replace(CONFIG, steps_per_dispatch=5), placed) == 5


@pytest.mark.parametrize("devices", [1, 2])
def test_a_busy_device_waits_for_no_dispatch_though_its_window_is_new(monkeypatch, devices):
    """Windows of one batch, so that each step has a record of its own; of two CPU devices each step is waited for."""
    shape = MeshShape(1, devices)
    model = tiny_model()
    placed = Placed(model, optimizer(), make_plan(model, shape, "data_parallel"), make_mesh(shape))
    config = dataclasses.replace(CONFIG, optimizer=placed.optimizer)
    feed = Feed(split_of(model), Cut(16, 1, multiple=devices), placed.mesh)
    waited, real = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or (x if isinstance(x, Busy) else real(x)))
    hosted = {}
    for ready in (False, True):
        state = types.SimpleNamespace(step=Busy(ready))
        with feed.train_windows(0, 0, shuffle=True) as windows:
            step = Stepper(config, placed, feed, windows)
            monkeypatch.setattr(step, "_compiled", lambda name, program, state, values, window: (state, values))
            for i in range(3):
                while not windows.is_ready:
                    time.sleep(0.001)
                step(state, i, 1)
        hosted[ready] = step.host_seconds
        assert sum(x is state.step for x in waited) == (3 if devices > 1 else 0)
    assert hosted[False] == 0 and (hosted[True] > 0) == (devices == 1)


def test_while_the_host_waits_for_the_device_the_device_does_not_wait_for_the_host(monkeypatch):
    """It ended all its steps at second 100, which the host waited for, and gets the next one at second 101."""
    model = tiny_model()
    placed = on_one_device(model, optimizer())
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("dlrm_jax.training.stepper.time.perf_counter", lambda: clock.now)
    feed = Feed(split_of(model), Cut(16, 4))
    with feed.train_windows(0, 0, shuffle=True) as windows:
        step = Stepper(CONFIG, placed, feed, windows)
        monkeypatch.setattr(step, "_compiled", lambda name, program, state, values, window: (state, values))
        state = types.SimpleNamespace(step=Busy(True))
        step(state, 0, 1)
        clock.now = 100.0
        step.caught_up()
        clock.now = 101.0
        step(state, 1, 1)
    assert step.host_seconds == 1


class Busy:
    """In place of the number of a step that a device is at."""

    def __init__(self, ready: bool) -> None:
        self.is_ready = lambda: ready


@pytest.mark.parametrize(("read_seconds", "last", "caught_up"), [(1e9, 11, 0), (0, 5, 3)])
def test_a_nan_is_seen_two_windows_later_at_the_latest(tmp_path, monkeypatch, read_seconds, last, caught_up):
    """Where no evaluation, checkpoint or pause of a second comes first; the step and the row are named all the same.

    Where each step is such a pause it is seen at once. Of the steps before, 0 is waited for to begin the clock, and 3
    is its window's last.
    """
    honest = planted.generate(0, 2000)
    labels = honest.splits["train"].label_R.copy()
    labels[64 * 5 + 7] = np.nan
    poisoned = dataclasses.replace(honest.splits["train"], label_R=labels)
    data = dataclasses.replace(honest, splits={**honest.splits, "train": poisoned})
    monkeypatch.setattr(planted, "generate", lambda seed, count: data)
    monkeypatch.setattr(feed_module, "MOST_STEPS", 4)
    monkeypatch.setattr(loop, "_READ_SECONDS", read_seconds)
    taken, waited_for = [], []
    monkeypatch.setattr(Stepper, "caught_up", lambda self: waited_for.append(taken[-1]))
    call = Stepper.__call__
    monkeypatch.setattr(Stepper, "__call__", lambda self, *args: taken.append(args[1]) or call(self, *args))
    quiet = dataclasses.replace(CONFIG, shuffle=False, eval_every=60, checkpoint_every=60)
    with pytest.raises(loop.ConfigError, match=r"not finite at step 6: the label is nan in row 7 of the batch"):
        loop.train_and_evaluate(quiet, tmp_path)
    assert taken[-1] == last, "step 6 is in the window of 4 to 7, which is read when that of 8 to 11 is gone through"
    assert len(waited_for) == caught_up


def test_losses_that_go_on_say_what_those_that_never_stopped_say(tmp_path):
    def record(first: int, losses: list[float]):
        rows = [[loss, 0.1, 1.0, 1.0] for loss in losses]
        return types.SimpleNamespace(first_step=first, values_TxM=jnp.array(rows), traveller=None)

    def watch(carried, written):
        return Losses(tmp_path, (), carried, 5, lambda step, values: written.append((step, values["loss"])), None)

    lines, more_lines = [], []
    through, before = watch({}, lines), watch({}, more_lines)
    for one in (through, before):
        one.flush(record(0, [0.1, 0.7]), 2)
    after = watch(before.held(), more_lines)
    through.push(record(2, [0.2, 0.3, 0.4]), 5)
    after.flush(record(2, [0.2, 0.3, 0.4]), 5)
    assert not lines, "a window is read when the next one is gone through"
    through.flush(record(5, [9.0]), 6)
    assert after.overflows == 5 and through.overflows == 6
    assert lines == more_lines == [(5, pytest.approx(0.34))]
