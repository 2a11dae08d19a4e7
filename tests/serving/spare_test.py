"""Rows to spare: values that are new since a version was exported come with a delta, program and tables as they are."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dlrm_jax.api.exported import open_exported
from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.export import export_model
from dlrm_jax.serving.artifact.export_delta import differing, export_delta
from dlrm_jax.serving.artifact.loaded import Servable
from dlrm_jax.serving.artifact.raw_bags import UNKNOWN
from dlrm_jax.serving.artifact.store import open_alone
from tests.data.extend_test import RICH, write_days
from tests.serving_helpers import lively_state, pieces_of
from tests.training.resume_test import CONFIG

SIZES = (4, 16)
LONGER = "longer than all of the first day"


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """(dataset, model, a state) of a log, and of the same log after a day that has other values too."""
    folder, found = tmp_path_factory.mktemp("days"), []
    for i, path in enumerate(write_days(folder, 2, rows=60)):
        if i:
            pathlib.Path(path).write_text(
                f"{pathlib.Path(path).read_text()}no,3,0.5,{LONGER},5,5,8,l1,1.5,2024-01-02\n"
            )
        options = Options("skip_and_count", extend=folder / "0") if i else Options("skip_and_count")
        prepare((path,), folder / str(i), RICH, options)
        dataset = open_prepared(folder / str(i))
        model = CONFIG.model.build(dataset)
        found.append((dataset, model, lively_state(model, i)))
    return found


def whole(model_dir, dataset, model, state, **more):
    arguments = (model_dir, model, LossConfig(), state.dense_params, pieces_of(model, state), dataset)
    return export_model(*arguments, evaluated=(), **more)


def delta(model_dir, parent, dataset, model, state):
    rows_of = differing(pieces_of(model, state), "float32")
    return export_delta(model_dir, parent, model, LossConfig(), state.dense_params, rows_of, dataset, evaluated=())


def test_new_values_take_the_rows_to_spare(days, tmp_path):
    (_, model, _), (_, larger, _) = days
    first = whole(tmp_path / "live", *days[0], spare_rows=3.0)
    servable = Servable(first, SIZES)
    row = {"x": "3", "y": "0.5", "c": "c1", "n": "5", "m": "5", "r": "3", "l": "l1|l2"}
    known, more = model.table("n").num_embeddings, larger.table("n").num_embeddings
    assert known < more
    *_, unknown = servable.reader.read([row | {"n": str(1000 + i)} for i in range(2)])
    assert unknown["n"] == 2
    new = next(value for value in range(40) if servable.reader.read([row | {"n": str(value)}])[2].get("n"))
    with pytest.raises(BadRequest, match="is outside table 'n'"):
        servable.checked(*(np.asarray(x) for x in _inputs(servable, "n", known)))
    delta(tmp_path / "live", first, *days[1])
    old, servable = servable, servable.changed_by(open_alone(tmp_path / "live", 2))()
    assert not servable.reader.read([row | {"n": str(new)}])[2].get("n"), "a new value is unknown still"
    servable.checked(*_inputs(servable, "n", more - 1))
    direct = Servable(whole(tmp_path / "direct", *days[1]), SIZES)
    read = load(tmp_path / "live", 2, SIZES)
    assert old.reader.ids("c", LONGER) == [UNKNOWN] and servable.reader.ids("c", LONGER)[0] >= 0
    batch = [row | {"n": str(value)} for value in range(30)] + [row | {"c": LONGER}]
    for one in (servable, read, old):
        inputs, want = direct.reader.read(batch)[:2], direct.predict_rows(batch)
        np.testing.assert_allclose(one.predict(*inputs) if one is not old else one.score(*inputs).probability, want)
    np.testing.assert_array_equal(servable.reader.read(batch)[1], direct.reader.read(batch)[1])
    assert read.signature == dataclasses.replace(direct.signature, spare=read.signature.spare)
    assert read.signature.spare["n"] == 4 * known - more
    assert open_exported(tmp_path / "live").model == larger


def _inputs(servable, table, id_):
    """One example that asks for an id of a table."""
    features = servable.signature.features
    starts = np.cumsum([0, *(feature.hotness for feature in features)])
    ids = np.full((1, servable.signature.num_slots), -1, np.int32)
    ids[0, starts[[feature.table for feature in features].index(table)]] = id_
    return np.zeros((1, len(servable.signature.dense_names)), np.float32), ids


def test_without_rows_to_spare_a_table_that_grew_needs_a_whole_version(days, tmp_path):
    first = whole(tmp_path, *days[0])
    with pytest.raises(
        ConfigError, match=r"more rows in table '\w+' than there are.*export a whole version, with --sp"
    ):
        delta(tmp_path, first, *days[1])
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_ids_that_stand_for_other_values_need_a_whole_version(days, tmp_path):
    before, model, state = days[0]
    first = whole(tmp_path / "live", before, model, state, spare_rows=1.0)
    path = next((first.directory / "vocabularies").glob("*_c.keys.npy"))
    np.save(path, np.load(path)[::-1].copy())
    with pytest.raises(ConfigError, match="ids of table 'c' stand for other values than in version 1; export a whole"):
        delta(tmp_path / "live", first, before, model, state)
