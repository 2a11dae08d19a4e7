"""A model served under the plans of training: the scores of one device, from tables that lie on several."""

import dataclasses

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.serving.artifact.loaded import Servable, load
from dlrm_jax.serving.artifact.placed import SeveralDevices, engine_maker
from dlrm_jax.serving.artifact.store import open_version
from dlrm_jax.training.options import ShardingOptions
from tests.forked import run
from tests.helpers import SHARDINGS, random_batch, tiny_model
from tests.server_process import running
from tests.serving_helpers import export_tiny

SIZES = (4, 16)
HALVES = tuple(dataclasses.replace(table, dtype="bfloat16") for table in tiny_model().tables)
VARIANTS = {
    "learned": ("float32", {"learned_pooling": True}),
    "cross": ("bfloat16", {"interaction": "cross", "cross_layers": 2, "cross_rank": 3}),
    "int8": ("int8", {}),
    "trained in two bytes": ("float32", {"tables": HALVES}),
}


def placed(model_dir, sharding="row_wise", mesh="model:4", like=None) -> Servable:
    make = engine_maker(ShardingOptions(sharding=sharding, mesh=mesh), SIZES[-1])
    return Servable(open_version(model_dir), SIZES, like=like, make_engine=make)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, exported once."""
    model_dir = tmp_path_factory.mktemp("exported")
    export_tiny(model_dir, tiny_model())
    return model_dir


@pytest.fixture(scope="module")
def on_one_device(exported):
    """It on one device."""
    return load(exported, batch_sizes=SIZES)


def assert_scores_of(one: Servable, servable: Servable, model) -> None:
    for rows in (3, 37):  # One execution that is not full; three.
        batch = random_batch(model, rows, seed=rows)
        want = one.predict(batch.dense_BxN, batch.ids_BxK)
        got = servable.predict(batch.dense_BxN, batch.ids_BxK)
        assert got.shape == (rows,)
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("sharding", [*SHARDINGS, "auto"])
@pytest.mark.sample(3)
def test_every_plan_gives_the_scores_of_one_device(exported, on_one_device, sharding):
    servable = placed(exported, sharding, "data:2,model:2")
    assert servable.self_check() < 1e-6
    assert_scores_of(on_one_device, servable, tiny_model())


def test_batch_sizes_are_what_devices_share_evenly(exported):
    make = engine_maker(ShardingOptions(sharding="row_wise", mesh="model:4"), 16)
    assert Servable(open_version(exported), (1, 2, 6, 16), make_engine=make).batch_sizes == (4, 8, 16)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.sample(1)
def test_stored_types_and_models(tmp_path, kind, changes):
    model = tiny_model(**changes)
    export_tiny(tmp_path, model, kind)
    assert_scores_of(load(tmp_path, batch_sizes=SIZES), placed(tmp_path), model)


def test_no_device_holds_a_whole_table(exported):
    engine = placed(exported)._engine
    assert isinstance(engine, SeveralDevices)
    for array in engine._tables.values():
        assert len(array.addressable_shards) == 4
        assert all(shard.data.shape[0] * 4 == array.shape[0] for shard in array.addressable_shards)


def test_a_next_version_keeps_what_is_compiled(tmp_path):
    export_tiny(tmp_path, tiny_model())
    export_tiny(tmp_path, tiny_model(), seed=1)
    make = engine_maker(ShardingOptions(sharding="table_wise", mesh="model:2"), 4)
    first = Servable(open_version(tmp_path, 1), (4,), make_engine=make)
    second = Servable(open_version(tmp_path, 2), (4,), like=first, make_engine=make)
    assert second._engine._forward is first._engine._forward
    assert second.self_check() < 1e-6


def test_an_export_without_its_configuration_says_so(tmp_path):
    version = export_tiny(tmp_path, tiny_model())
    (version.directory / "model.json").unlink()
    with pytest.raises(ConfigError, match="export it anew"):
        SeveralDevices(version, ShardingOptions(mesh="model:2"), 4)


@pytest.mark.end_to_end
def test_the_command_serves_over_a_mesh(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    model = tiny_model()
    export_tiny(tmp_path / "model", model)
    batch = random_batch(model, 3)
    want = load(tmp_path / "model").predict(batch.dense_BxN, batch.ids_BxK)
    with running(tmp_path / "model", "--mesh=model:4", "--sharding=row_wise", "--batch_sizes=4") as server:
        values = (("dense", "FP32", batch.dense_BxN), ("ids", "INT32", batch.ids_BxK))
        inputs = [{"name": n, "datatype": t, "shape": v.shape, "data": v.ravel().tolist()} for n, t, v in values]
        status, _, answer = server.ask("POST", "/v2/models/tiny/infer", {"inputs": inputs})
        assert status == 200
        outputs = {output["name"]: output["data"] for output in answer["outputs"]}
        np.testing.assert_allclose(outputs["probability"], want, atol=1e-6)
        assert server.stop() == 0


def test_sharding_without_a_mesh_is_one_line(tmp_path):
    finished = run("serve", f"--model={tmp_path}", "--sharding=row_wise")
    assert finished.returncode == 1 and "give --mesh=model:N too" in finished.stderr
