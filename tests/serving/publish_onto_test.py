"""What a process publishes onto versions of another: a run that goes on, the next day's run, period after period."""

import dataclasses
import logging
import pathlib
import shutil

import numpy as np
import pytest

from dlrm_jax.api.exported import open_exported
from dlrm_jax.api.exporting import export
from dlrm_jax.api.trained import open_stored
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.schema.schema import Sparse, Split
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact.publish import open_publisher
from dlrm_jax.serving.artifact.store import open_alone, open_version, parent_of, versions
from dlrm_jax.serving.artifact.weights import read_dense
from dlrm_jax.training import loop, online
from dlrm_jax.training.periods import OnlineOptions
from dlrm_jax.training.publish_options import PublishOptions
from tests.data.extend_test import RICH, write_days
from tests.helpers import optimizer
from tests.prepared_helpers import csv_rows, prepare_text, schema
from tests.serving.deltas_test import arrays
from tests.training.online_test import rows_of
from tests.training.resume_test import CONFIG

SIZES = (16,)
SMALL = dataclasses.replace(
    CONFIG, optimizer=optimizer("rowwise_adagrad", "adam", rate=0.1), batch_size=4, num_steps=3, eval_every=100
)


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, logger="dlrm_jax")
    return caplog


def config_of(data_dir: pathlib.Path, model_dir: pathlib.Path, **publishing):
    options = PublishOptions(str(model_dir), **{"every": "1", "whole_every": 50, "keep": 9, **publishing})
    return dataclasses.replace(SMALL, data=DataConfig(data_dir=str(data_dir)), publishing=options)


def parents(model_dir: pathlib.Path) -> list[int | None]:
    """The version that each version changes; None for whole ones."""
    return [parent_of(model_dir, number) for number in versions(model_dir)]


def assert_newest_is_an_export(
    model_dir: pathlib.Path, workdir: pathlib.Path, out: pathlib.Path, tables: str = "float32"
) -> None:
    """The newest version has the bits that an export of the run's latest checkpoint has; rows to spare are behind."""
    live, direct = open_version(model_dir), export(open_stored(workdir, "latest"), out, tables)
    assert live.manifest["step"] == direct.manifest["step"]
    found, want = arrays(live), arrays(direct)
    for name, rows in want.items():
        np.testing.assert_array_equal(found[name][: len(rows)].view(np.uint8), rows.view(np.uint8), err_msg=name)
    found, want = read_dense(live), read_dense(direct)
    for name, values in want.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert load(model_dir, batch_sizes=SIZES).self_check() < 1e-6


@pytest.fixture(scope="module")
def by_days(tmp_path_factory):
    of = schema(sparse=(Sparse("c", oov=True),), timestamp="x", split=Split("time", period="1", val=1, test=1))
    rows = csv_rows(rows_of("abcefgh", "ab", "adc", "ad", "b"))
    return prepare_text(tmp_path_factory.mktemp("by_days"), rows, of)


def test_online_publishes_behind_each_period_and_goes_on_where_it_was_stopped(by_days, tmp_path, monkeypatch, told):
    model_dir, workdir = tmp_path / "live", tmp_path / "run"
    config = config_of(by_days, model_dir, every="2")
    options = OnlineOptions(evict_after=2)  # Behind the last period too: of a row that no batch of it named.
    score = online._score

    def dying(run, scores, model, state, number):
        if (model, number) == (online.LIVING, 2):
            raise KeyboardInterrupt
        score(run, scores, model, state, number)

    def validate():
        return online.validate_progressively(config, options, workdir, open_publisher=open_publisher)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(online, "_score", dying)
        validate()
    assert parents(model_dir) == [None, 1, 2, 3]
    result = validate()
    assert [one["evicted"].get("c", 0) for one in result["periods"]] == [0, 0, 4, 1, 1]
    assert parents(model_dir) == [None, *range(1, 8)], "a chain from the first version to the last"
    steps = [open_alone(model_dir, number).manifest["step"] for number in versions(model_dir)]
    assert steps == [2, 4, 6, 8, 10, 11, 13, 14], "every second step of a period, and its last"
    assert "published version 5, step 10: 3 rows that changed since version 4" in told.text
    assert_newest_is_an_export(model_dir, workdir, tmp_path / "direct")
    validate()
    assert "version 8 is this model: no other one is published" in told.text and len(versions(model_dir)) == 8
    shutil.rmtree(model_dir / "8")
    validate()
    assert_newest_is_an_export(model_dir, workdir, tmp_path / "direct")


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Datasets of a log, and of the same log after a day that has other values too."""
    folder = tmp_path_factory.mktemp("days")
    first, second = write_days(folder, 2, rows=60)
    prepare((first,), folder / "first", RICH, Options("skip_and_count"))
    prepare((second,), folder / "both", RICH, Options("skip_and_count", extend=folder / "first"))
    return folder / "first", folder / "both"


def train(config, workdir):
    loop.train_and_evaluate(config, workdir, open_model=open_exported, open_publisher=open_publisher, progress=False)


@pytest.mark.parametrize("spare_rows", [3.0, 0.0])
@pytest.mark.sample(1)
@pytest.mark.exhaustive
def test_a_second_day_goes_on_by_deltas_where_its_new_rows_have_room(days, tmp_path, spare_rows, told):
    model_dir = tmp_path / "live"
    train(config_of(days[0], model_dir, spare_rows=spare_rows), tmp_path / "first")
    assert parents(model_dir) == [None, 1, 2]
    second = config_of(days[1], model_dir, spare_rows=spare_rows)
    train(dataclasses.replace(second, init_from=str(tmp_path / "first")), tmp_path / "second")
    if spare_rows:
        assert parents(model_dir) == [None, 1, 2, 3, 4, 5]
        assert "published version 4, step 4: " in told.text and "rows that changed since version 3" in told.text
    else:
        assert parents(model_dir) == [None, 1, 2, None, 4, 5]
        assert "more rows in table" in told.text and "; the next version is whole" in told.text
    assert_newest_is_an_export(model_dir, tmp_path / "second", tmp_path / "direct")
    row = {"x": "3", "y": "0.5", "c": "c1", "n": "5", "m": "5", "r": "3", "l": "l1|l2"}
    batch = [row | {"n": str(value)} for value in range(40)]
    live, direct = (load(path, batch_sizes=SIZES) for path in (model_dir, tmp_path / "direct"))
    np.testing.assert_array_equal(live.predict_rows(batch), direct.predict_rows(batch))


@pytest.mark.exhaustive
def test_what_is_no_delta_of_what_is_there_is_whole_and_says_why(days, tmp_path, told):
    model_dir = tmp_path / "live"

    def published(name, **changes):
        options = {key: changes.pop(key) for key in ("tables", "whole_every") if key in changes}
        config = dataclasses.replace(config_of(days[0], model_dir, every="3", **options), **changes)
        train(config, tmp_path / name)
        return parent_of(model_dir, versions(model_dir)[-1])

    assert published("first") is None
    assert published("other weights", seed=1) is None
    assert "more than nine tenths of its rows are others now; the next version is whole" in told.text
    assert published("other type", seed=1, tables="bfloat16") is None
    assert "version 2 has tables of float32, --publish_tables=bfloat16; the next version is whole" in told.text
    assert published("the same weights", seed=1, tables="bfloat16", num_steps=4) == 4, "every third step, and the last"
    assert published("the chain is long", seed=1, tables="bfloat16", whole_every=2) is None
    (model_dir / "6" / "manifest.json").write_text("{}")
    assert published("damaged", seed=1, tables="bfloat16") is None
    assert "manifest.json is not a manifest: 'format_version'; the next version is whole" in told.text
