"""The examples of docs/ADDING.md, run as they stand from outside the package, each through what a user would do."""

import dataclasses
import re

import numpy as np
import pytest

from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.formats.readers import READERS
from dlrm_jax.data.schema.schema import Dense, Sparse
from dlrm_jax.data.schema.schema_io import to_dict
from dlrm_jax.data.values.buckets import BUCKETS
from dlrm_jax.data.values.transforms import TRANSFORMS
from dlrm_jax.model.interactions.base import INTERACTIONS
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.signature import ServedFeature, Signature
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.compress import WAYS, compressed
from dlrm_jax.tables.id_maps import ID_MAPS
from dlrm_jax.tables.rules import RULES, make_rule
from dlrm_jax.training import loop
from dlrm_jax.training.checkpoint import LATEST, Checkpoints
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.step import make_train_step
from tests.helpers import ROOT, optimizer, random_batch, tiny_model
from tests.prepared_helpers import prepare_text, rows_of, schema
from tests.training.resume_test import CONFIG

SECTIONS = {
    section.partition("\n")[0]: section for section in (ROOT / "docs" / "ADDING.md").read_text().split("\n## ")[1:]
}
REGISTRIES = {
    "A table optimizer": (RULES, "signum"),
    "An id map": (ID_MAPS, "reversed"),
    "A way to compress tables": (WAYS, "reverse"),
    "A dense transform": (TRANSFORMS, "sqrt"),
    "A rule of buckets": (BUCKETS, "tens"),
    "An input format": (READERS, "fixed"),
}


@pytest.fixture
def added(monkeypatch):
    """`added(section)` runs the section's example, whose thing is known until the test ends."""

    def add(title: str) -> None:
        registry, name = REGISTRIES[title]
        monkeypatch.setattr(registry, "_known", registry.all())
        (example,) = re.findall(r"```python\n(.*?)```", SECTIONS[title], flags=re.DOTALL)
        assert name not in registry.all()
        exec(compile(example, title, "exec"), {"__name__": "theirs"})
        assert name in registry.all()

    return add


def test_the_page_names_every_registry_and_its_entry_points():
    table = SECTIONS and (ROOT / "docs" / "ADDING.md").read_text()
    for registry in (INTERACTIONS, *(registry for registry, _ in REGISTRIES.values())):
        assert f"`{registry._group}`" in table


def test_a_table_optimizer_trains_resumes_and_is_refused_with_wrong_options(added, tmp_path):
    added("A table optimizer")
    settings = dataclasses.replace(CONFIG.optimizer, table="signum,beta=0.8")
    config = dataclasses.replace(CONFIG, optimizer=settings, num_steps=20)
    for steps in (10, 20):
        loop.train_and_evaluate(dataclasses.replace(config, num_steps=steps), tmp_path)
    model = config.model.build(loop.load_dataset(config.data))
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(LATEST, on_one_device(model, settings))
    assert int(state.step) == 20 and np.abs(state.table_opt_state["stack_0"]["mean"]).max() > 0
    with pytest.raises(ConfigError, match="signum has no option 'b1'; its options: beta"):
        make_rule(optimizer("signum,b1=2"))


def test_an_id_map_and_a_way_to_compress_give_the_rows_that_they_say(added):
    added("An id map")
    added("A way to compress tables")
    model, settings = compressed(tiny_model(), "reverse,threshold=5"), optimizer("sgd")
    assert [bool(feature.parts) for feature in model.features] == [True, True, True, False]
    placed = on_one_device(model, settings)
    state, batch = placed.init_state(0), random_batch(tiny_model(), 1)
    batch = batch.replace(ids_BxK=np.array([[2, -1, -1, -1, -1, -1, -1]], np.int32))
    before = {name: np.array(rows) for name, rows in named_tables(model, state.tables)}
    after, _ = placed.jit_step(make_train_step(model, LossConfig(), settings, 1, placed.ops))(state, batch)
    changed = {name: (np.array(rows) != before[name]).any(axis=1) for name, rows in named_tables(model, after.tables)}
    assert np.flatnonzero(changed["user"]).tolist() == [11 - 1 - 2]
    assert not changed["item"].any()


def test_a_dense_transform_means_the_same_in_preparation_and_serving(added, tmp_path):
    added("A dense transform")
    log = schema(dense=(Dense("x", transform="sqrt"),), sparse=(Sparse("c", ids="hash", size=3),))
    prepared = rows_of(prepare_text(tmp_path, "label,x,c\n1,9,a\n0,2,b\n", log)).dense_RxN[:, 0]
    np.testing.assert_array_equal(prepared, np.sqrt(np.array([9, 2], np.float32)))
    signature = Signature("m", ("x",), (ServedFeature("c", "c", 1, "sum", 3),), 4, "float32", to_dict(log), None)
    served, _, _ = Reader(signature, {}).read([{"x": 9, "c": "a"}, {"x": 2, "c": "b"}])
    np.testing.assert_array_equal(served[:, 0], prepared)
    with pytest.raises(BadRequest, match="row 0, feature 'x': -1 has no finite float32 under sqrt"):
        Reader(signature, {}).read([{"x": -1, "c": "a"}])
    (tmp_path / "bad").mkdir()
    with pytest.raises(ConfigError, match="column x: '-1'"):
        prepare_text(tmp_path / "bad", "label,x,c\n1,-1,a\n", log)


def test_a_rule_of_buckets_means_the_same_in_preparation_and_serving(added, tmp_path):
    added("A rule of buckets")
    log = schema(dense=(), sparse=(Sparse("x", buckets="tens", ids="raw", size=9),))
    prepared = rows_of(prepare_text(tmp_path, "label,x\n1,39.5\n0,7\n", log)).ids_RxK
    signature = Signature("m", (), (ServedFeature("x", "x", 1, "sum", 9),), 4, "float32", to_dict(log), None)
    _, served, _ = Reader(signature, {}).read([{"x": 39.5}, {"x": "7"}])
    assert served.tolist() == prepared.tolist() == [[3], [0]]
    with pytest.raises(BadRequest, match="row 0, feature 'x': -1 is outside the table's ids 0 to 8"):
        Reader(signature, {}).read([{"x": -1}])


def test_an_input_format_is_read(added, tmp_path):
    added("An input format")
    output = prepare_text(tmp_path, "1 9.5 a\n0   2 b\n1   3 a\n", schema(format="fixed"), name="log.dat")
    rows = rows_of(output)
    np.testing.assert_array_equal(rows.dense_RxN[:, 0], [9.5, 2, 3])
    assert rows.ids_RxK[:, 0].tolist() == [0, 1, 0] and rows.label_R.tolist() == [1, 0, 1]
    with pytest.raises(ConfigError, match=r"schema: format is 'fixde'; choose one of text, .*fixed"):
        schema(format="fixde")
