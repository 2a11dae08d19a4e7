"""The examples of docs/ADDING.md, run as they stand from outside the package, each through what a user would do."""

import dataclasses
import math
import re
import zlib

import numpy as np
import pytest

from dlrm_jax.api.trained import open_stored
from dlrm_jax.cli.flags import flagfile_text
from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.formats.readers import READERS
from dlrm_jax.data.schema.schema import Dense, Sparse
from dlrm_jax.data.schema.schema_io import to_dict
from dlrm_jax.data.values.buckets import BUCKETS
from dlrm_jax.data.values.transforms import TRANSFORMS
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.model.interactions.base import INTERACTIONS
from dlrm_jax.planning import planner, report
from dlrm_jax.planning.cost import Load, estimate
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.signature import ServedFeature, Signature
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.compress import WAYS, compressed
from dlrm_jax.tables.dtypes import DTYPES
from dlrm_jax.tables.forms import FORMS
from dlrm_jax.tables.forms.row_wise import RowWise
from dlrm_jax.tables.id_maps import ID_MAPS
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.tables.reshard import Kind
from dlrm_jax.tables.rules import RULES
from dlrm_jax.training import loop, opening
from dlrm_jax.training.checkpoint import LATEST, Checkpoints
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.step import make_train_step
from tests import serving_helpers
from tests.helpers import ROOT, optimizer, random_batch, tiny_model
from tests.model.outside_interactions_test import flags_of
from tests.planning import planner_test
from tests.prepared_helpers import prepare_text, rows_of, schema
from tests.tables import placement_test
from tests.training.resume_test import CONFIG

SECTIONS = {
    section.partition("\n")[0]: section for section in (ROOT / "docs" / "ADDING.md").read_text().split("\n## ")[1:]
}
REGISTRIES = {
    "A table optimizer": (RULES, "signum"),
    "A sharding type": (FORMS, "hashed"),
    "A table dtype": (DTYPES, "fixed8"),
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


@pytest.mark.exhaustive
def test_a_table_optimizer_trains_resumes_and_is_refused_with_wrong_options(added, tmp_path):
    added("A table optimizer")
    settings = dataclasses.replace(CONFIG.optimizer, table="signum,beta=0.8")
    config = dataclasses.replace(CONFIG, optimizer=settings, num_steps=20)
    for steps in (10, 20):
        loop.train_and_evaluate(dataclasses.replace(config, num_steps=steps), tmp_path)
    model = opening.read(config)[1]
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(LATEST, on_one_device(model, settings))
    assert int(state.step) == 20 and np.abs(state.table_opt_state["stack_0"]["mean"]).max() > 0
    with pytest.raises(ConfigError, match="signum has no option 'b1'; its options: beta"):
        make_rule(optimizer("signum,b1=2"))


def test_a_sharding_type_equals_one_device_and_is_planned(added):
    added("A sharding type")
    placed = placement_test.place((2, 4), "hashed", "rowwise_adagrad")
    assert {name: one.first for name, one in placed.plan.tables.items()} == {
        name: zlib.crc32(name.encode()) % 4 for name in ("user", "item", "flag", "page")
    }
    placement_test.assert_equals_one_device(placed, "rowwise_adagrad")
    ranked = dict(planner.ranking(planner_test.SETTING))
    assert ranked["hashed"].bytes_held >= ranked["table_wise"].bytes_held
    assert "hashed on" in report.text(planner_test.SETTING, ranked["hashed"], list(ranked.items()))


def test_a_form_with_a_step_of_its_own_needs_stacks_of_its_own():
    with pytest.raises(TypeError, match="Mine has its own lookup; give it `arrays`"):
        type("Mine", (RowWise,), {"lookup": RowWise.lookup})


@pytest.mark.exhaustive
def test_a_table_dtype_trains_under_a_sharding_type_of_another_package(added, tmp_path, caplog):
    """Both by flags, on a mesh; resumed on one device, exported and served."""
    added("A sharding type")
    added("A table dtype")
    caplog.set_level("INFO", "dlrm_jax")
    common = ("--table_dtype=fixed8", "--embedding_dim=4", "--bottom_mlp=4", "--top_mlp=4,1", "--num_examples=2000",
              "--batch_size=256", "--learning_rate=0.5")  # fmt: skip
    with flags_of(*common, "--num_steps=10", "--sharding=hashed", "--mesh=model:4") as config:
        loop.train_and_evaluate(config, tmp_path / "run", flagfile_text())
    with flags_of(*common, "--num_steps=20", "--mesh=model:1", "--kernels=native") as config:
        loop.train_and_evaluate(config, tmp_path / "run", flagfile_text())
    assert "tables.cc has float32 of one dim only, so XLA looks up and updates these tables" in caplog.text
    opened = open_stored(tmp_path / "run", "latest")
    assert opened.step == 20
    stored = opened.rows.rows(Kind("tables", False, False), opened.model.tables[0].name, 0, 1, 9)
    assert stored.dtype == np.int8 and len(np.unique(stored)) > 9
    cost = estimate(opened.model, opened.config.optimizer, make_plan(opened.model, MeshShape(1, 1), "hashed"),
                    Load(256), HARDWARE["cpu"])  # fmt: skip
    placed = on_one_device(opened.model, opened.config.optimizer)
    assert cost.memory["tables"] == sum(math.prod(table.shape) for table in placed.abstract_state.tables.values())
    serving_helpers.export_tiny(tmp_path / "model", opened.model)
    assert load(tmp_path / "model").self_check() < 1e-6


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
