"""Tests `dlrm_jax/serving/artifact/folded.py`: an export without batch norms scores as evaluation does with them."""

import jax
import numpy as np
import pytest

from dlrm_jax.config import HiddenConfig, LossConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.serving.artifact.folded import folded
from dlrm_jax.serving.artifact.loaded import Servable, load
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.weights import read_dense, read_model
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.step import make_eval_step
from tests.helpers import random_batch, tiny_model
from tests.serving_helpers import export_tiny, lively_state
from tests.tables.native_test import needs_compiler

MODELS = {
    "of a batch": {
        "interaction": "cat",
        "bottom_hidden": HiddenConfig("prelu", "batch", 0.1),
        "top_hidden": HiddenConfig("relu", "batch", 0.4),
        "top_mlp": (40, 30, 1),
    },
    "of a layer": {
        "bottom_hidden": HiddenConfig("gelu", "layer"),
        "top_hidden": HiddenConfig("silu", "layer", 0.2),
    },
}
TOWER = {"interaction": "parallel_cross", "cross_layers": 1, "cross_rank": 3, "tower_mlp": (6, 5), "top_mlp": (1,)}


def evaluated(model, batch: Batch) -> np.ndarray:
    """What evaluation says of a batch."""
    return np.asarray(jax.jit(make_eval_step(model, LossConfig()))(lively_state(model), batch).prob_B)


@needs_compiler
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
@pytest.mark.sample(1)
def test_server_several_devices_and_native_score_as_evaluation_does(tmp_path, changes):
    model = tiny_model(**changes)
    version, batch = export_tiny(tmp_path, model), random_batch(model, 16)
    want = evaluated(model, batch)
    several = engine_maker(ShardingOptions(sharding="row_wise", mesh="model:2"), 16)
    engines = {
        "server": load(tmp_path, batch_sizes=(16,)),
        "several devices": Servable(version, (16,), make_engine=several),
        "native": load(tmp_path, batch_sizes=(16,), make_engine=NativeCpu),
    }
    assert np.ptp(want) > 0.01
    for name, engine in engines.items():
        got = engine.predict(batch.dense_BxN, batch.ids_BxK)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 0.01)])
@pytest.mark.sample(1)
def test_a_tower_is_folded_too(tmp_path, dtype, atol):
    hidden = {"top_hidden": HiddenConfig(norm="batch"), "bottom_hidden": HiddenConfig(norm="layer")}
    model = tiny_model(**TOWER, **hidden, compute_dtype=dtype)
    version, batch = export_tiny(tmp_path, model), random_batch(model, 16)
    got = load(tmp_path, batch_sizes=(16,)).predict(batch.dense_BxN, batch.ids_BxK)
    np.testing.assert_allclose(got, evaluated(model, batch), rtol=0, atol=atol)
    names = read_dense(version)
    assert "parallel_cross/tower/layer_1/bias" in names and not any("tower/norm" in name for name in names)
    exported, _ = read_model(version)
    assert exported.top_hidden.norm == "none" and exported.bottom_hidden.norm == "layer"


def test_a_model_without_batch_norms_stays_as_it_is():
    model = tiny_model(top_hidden=HiddenConfig(norm="layer", dropout=0.5))
    params = {"top_mlp": {"layer_0": {"kernel": np.ones((2, 2))}}}
    assert folded(model, params, {}) == (model, params)


def test_averages_that_are_missing_are_named(tmp_path):
    model = tiny_model(top_hidden=HiddenConfig(norm="batch"))
    with pytest.raises(ValueError, match="top_mlp/norm_0 has no running averages: give batch_stats"):
        folded(model, lively_state(model).dense_params, {})
