"""What a training publishes: every version, whole or a delta, is to the bit what an export of that state would be."""

import dataclasses
import logging

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.planning import report
from dlrm_jax.planning.cost import MARKS, marks_bytes
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.serving.artifact import publish
from dlrm_jax.serving.artifact.export import export_model
from dlrm_jax.serving.artifact.loaded import Servable
from dlrm_jax.serving.artifact.publish import open_publisher
from dlrm_jax.serving.artifact.store import open_alone, open_version, prune, versions, write_version
from dlrm_jax.serving.artifact.weights import read_dense
from dlrm_jax.serving.artifact.written import pieces_of
from dlrm_jax.tables.id_maps import row_numbers
from dlrm_jax.training import loop, opening
from dlrm_jax.training.live import live_rows
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placement import place_run, prediction, setting_of
from dlrm_jax.training.publish_options import PublishOptions
from dlrm_jax.training.touched import Touched
from tests.helpers import optimizer, random_batch
from tests.serving.deltas_test import arrays
from tests.training.resume_test import CONFIG

DATA = DataConfig(dataset="synthetic", num_examples=1500, num_dense=2, table_sizes=(400, 90, 7))
SHORT = dataclasses.replace(CONFIG, data=DATA, num_steps=32, batch_size=16)
RUNS = {
    "int8, rows that steps make": dataclasses.replace(
        SHORT,
        model=dataclasses.replace(SHORT.model, learned_pooling=True),
        data_on_device="never",
        publishing=PublishOptions(every="7", whole_every=4, tables="int8", keep=9),
    ),
    "row-wise, two hashes a table, rows that stay, several steps at once": dataclasses.replace(
        SHORT,
        model=dataclasses.replace(SHORT.model, compress_tables="two_hashes,threshold=80"),
        optimizer=optimizer("adam", "sgd", rate=0.01),
        data_on_device="always",
        steps_per_dispatch=4,
        sharding=ShardingOptions(sharding="row_wise", mesh="data:2,model:2"),
        publishing=PublishOptions(every="10", whole_every=4, keep=9),
    ),
}


def beside(direct):
    """open_publisher, and each state exported as a whole into `direct`."""

    class Beside(publish.Publisher):
        def exported(self, state, facts):
            rows = pieces_of(self._placed.model, live_rows(self._placed, state))
            arguments = (direct, self._placed.model, self._loss, state.dense_params, rows, self._dataset, self._kind)
            export_model(*arguments, facts, evaluated=())

        def whole(self, state, facts):
            self.exported(state, facts)
            return super().whole(state, facts)

        def delta(self, state, rows, facts):
            self.exported(state, facts)
            return super().delta(state, rows, facts)

    return Beside


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS.keys())
@pytest.mark.sample(1)
def test_each_version_is_what_an_export_of_the_state_would_be(tmp_path, monkeypatch, config):
    monkeypatch.setattr(publish, "Publisher", beside(tmp_path / "direct"))
    options = dataclasses.replace(config.publishing, model_dir=str(tmp_path / "live"))
    loop.train_and_evaluate(
        dataclasses.replace(config, publishing=options), tmp_path / "run", open_publisher=open_publisher
    )
    numbers, parts, servable = versions(tmp_path / "live"), 0, None
    due = [*range(options.steps, 33, options.steps), *([32] if 32 % options.steps else [])]
    assert [open_alone(tmp_path / "live", n).manifest["step"] for n in numbers] == due
    assert [n for n in numbers if open_alone(tmp_path / "live", n).changes is None] == numbers[:: options.whole_every]
    for number in numbers:
        live, direct = open_version(tmp_path / "live", number), open_version(tmp_path / "direct", number)
        got, want = arrays(live), arrays(direct)
        for name, rows in want.items():
            np.testing.assert_array_equal(got[name].view(np.uint8), rows.view(np.uint8), err_msg=f"{number} {name}")
        got, want = read_dense(live), read_dense(direct)
        for name, values in want.items():
            np.testing.assert_array_equal(got[name], values, err_msg=f"{number} {name}")
        servable = Servable(live, (16,), like=servable)
        assert servable.self_check() < 1e-6, "what is noted of a version is not its own"
        all_rows = sum(len(rows) for rows in arrays(direct).values())
        parts += live.changes is not None and 0 < live.manifest["rows"] < 0.8 * all_rows
        updated = live.manifest["updated"]
        assert updated["first"] < updated["last"]
    assert parts == sum(open_alone(tmp_path / "live", n).changes is not None for n in numbers) >= 2


@pytest.mark.exhaustive
def test_a_version_that_cannot_be_written_ends_nothing_and_the_next_one_is_whole(tmp_path, monkeypatch, caplog):
    failing = [True]

    def full(*arguments, **more):
        if failing.pop() if failing else False:
            raise OSError(28, "No space left on device")
        return export_delta(*arguments, **more)

    export_delta = publish.export_delta
    monkeypatch.setattr(publish, "export_delta", full)
    model_dir, caplog.handler.level = tmp_path / "live", logging.INFO
    config = dataclasses.replace(SHORT, publishing=PublishOptions(str(model_dir), "8", 20, keep=9), num_steps=24)
    loop.train_and_evaluate(config, tmp_path / "run", open_publisher=open_publisher)
    assert [open_alone(model_dir, n).changes is None for n in versions(model_dir)] == [True, True]
    assert "could not be published: [Errno 28] No space left on device; the next one is whole" in caplog.text
    # Nobody marked what an earlier process changed: the first version of one that goes on is compared, row by row.
    config = dataclasses.replace(config, num_steps=40)
    loop.train_and_evaluate(config, tmp_path / "run", open_publisher=open_publisher)
    found = [(open_alone(model_dir, n).manifest["step"], open_alone(model_dir, n).changes) for n in versions(model_dir)]
    assert [(step, changes is None) for step, changes in found[2:]] == [(32, False), (40, False)]


def test_two_trainings_do_not_publish_in_one_directory(tmp_path):
    config = dataclasses.replace(SHORT, publishing=PublishOptions(str(tmp_path / "live")))
    with pytest.raises(ConfigError, match=r"is for dlrm_jax\.train and dlrm_jax\.online; leave it out here"):
        loop.train_and_evaluate(config, tmp_path / "run")
    (tmp_path / "live").mkdir()
    refused = pytest.raises(ConfigError, match="another training publishes in")
    with publish.files.alone(tmp_path / "live" / publish.LOCK, "me"), refused:
        loop.train_and_evaluate(config, tmp_path / "run", open_publisher=open_publisher)


@pytest.mark.parametrize("every", ["0", "-3", "1.5s", "s", "", "3m"])
def test_a_time_between_versions_that_is_none_is_refused(every):
    with pytest.raises(ConfigError, match="give steps, as 1000, or seconds, as 30s"):
        PublishOptions("x", every)


def test_pruning_keeps_what_the_newest_version_changes(tmp_path):
    def version(parent=None):
        said = {} if parent is None else {"parent": {"version": parent, "sha256": ""}}
        return write_version(tmp_path, lambda directory: (directory / "x").write_text("x"), said).number

    for parent in (None, 1, None, 3, 4, None, 5):  # The newest, 7, changes 5, and so 3.
        version(parent)
    assert prune(tmp_path, 1) == [2, 1] and versions(tmp_path) == [3, 4, 5, 6, 7]
    (tmp_path / "9").mkdir()  # Without a manifest: no version, and no reason to delete any.
    assert prune(tmp_path, 1) == [] and versions(tmp_path) == [3, 4, 5, 6, 7, 9]
    version()
    assert prune(tmp_path, 2) == [5, 4, 3] and versions(tmp_path) == [6, 7, 9, 10]


def test_marks_take_the_memory_that_is_predicted():
    config = dataclasses.replace(SHORT, publishing=PublishOptions("x"))
    dataset, model = opening.read(config)
    placed = place_run(config, model, dataset)
    marks = Touched(model)
    assert prediction(config, placed).memory[MARKS] == marks._marks.nbytes == marks_bytes(model)
    assert MARKS not in prediction(SHORT, placed).memory
    setting = dataclasses.replace(setting_of(config, model, placed.plan.mesh), hardware=HARDWARE["h100"])
    cost = setting.cost_of(placed.plan)
    assert MARKS not in cost.memory, "the host has them"
    assert f"memory of the host: {MARKS} 0.0 MB" in report.text(setting, cost, [("data_parallel", cost)])


def test_what_examples_ask_for_is_marked_and_nothing_else():
    for changes in ({}, {"compress_tables": "two_hashes,threshold=80"}, {"compress_tables": "qr,threshold=80"}):
        model = dataclasses.replace(SHORT.model, **changes).build(load_dataset(SHORT.data))
        touched, ids = Touched(model), random_batch(model, 5).ids_BxK
        touched.see(ids[:2])
        touched.see(ids[2:])
        starts = np.cumsum([0, *(feature.hotness for feature in model.features)])
        want: dict[str, set] = {table.name: set() for table in model.tables}
        for one in model.lookups:
            asked = ids[:, starts[one.feature] : starts[one.feature + 1]]
            rows = row_numbers(one.part, model.table(one.part.table).num_embeddings, asked)
            want[one.part.table] |= set(rows[asked >= 0].tolist())
        assert {name: set(rows.tolist()) for name, rows in touched.rows().items()} == want
        touched.clear()
        assert not any(map(len, touched.rows().values()))
