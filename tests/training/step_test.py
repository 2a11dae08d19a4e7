"""Tests `dlrm_jax/training/step.py`: the row-sparse step equals a dense-gradient step of the same model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from dlrm_jax.config import LossConfig, ModelConfig, OptimizerConfig
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.model.loss import example_losses
from dlrm_jax.model.metrics import Metrics
from dlrm_jax.tables.exchange import local_ops
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.state import TrainState, init_state
from dlrm_jax.training.step import logits, make_eval_step, make_pipelined_step, make_train_step
from tests.helpers import optimizer, random_batch, tiny_model


@functools.partial(jax.jit, static_argnums=(0, 1))
def dense_step(model: ModelConfig, optimizer: OptimizerConfig, params: dict, sums: dict, batch) -> tuple[dict, dict]:
    """The oracle: autodiff through the lookup, and the textbook update of every weight of every table."""

    def loss(params):
        ops = local_ops(model)
        pooled, _ = ops.lookup(params["tables"], ops.route(batch.ids_BxK, batch.id_weights_BxK))
        logits_B = DLRM(model).apply({"params": params["dense"]}, batch.dense_BxN, pooled)
        return (example_losses(LossConfig(), logits_B, batch.label_B) * batch.weight_B).sum() / batch.weight_B.sum()

    grads = jax.grad(loss)(params)
    rate = optimizer.schedule.learning_rate
    if optimizer.table == "sgd":
        return jax.tree.map(lambda w, g: w - rate * g, params, grads), sums
    squares = jax.tree.map(jnp.square, grads)
    if optimizer.table == "rowwise_adagrad":
        squares["tables"] = jax.tree.map(lambda s: s.mean(axis=1, keepdims=True) + 0 * s, squares["tables"])
    sums = jax.tree.map(jnp.add, sums, squares)
    new = jax.tree.map(lambda w, g, s: w - rate * g / (jnp.sqrt(s) + optimizer.eps), params, grads, sums)
    return new, sums


@pytest.mark.parametrize(
    ("table", "interaction", "learned"),
    [
        ("sgd", "dot", False),
        ("adagrad", "dot", False),
        ("rowwise_adagrad", "dot", False),
        ("rowwise_adagrad", "cat", True),
        ("sgd", "cross", True),
        ("adagrad", "cross", False),
    ],
)
@pytest.mark.sample(3)
def test_ten_steps_equal_dense_gradients(table, interaction, learned):
    model = tiny_model(interaction=interaction, cross_layers=2, cross_rank=3, learned_pooling=learned)
    config = optimizer(table, "sgd" if table == "sgd" else "adagrad", rate=0.05)
    state = init_state(model, config, seed=0)
    params = {"dense": state.dense_params, "tables": state.tables}
    sums = jax.tree.map(jnp.zeros_like, params)
    train_step = jax.jit(make_train_step(model, LossConfig(), config))
    for i in range(10):
        batch = random_batch(model, 16, seed=i)
        params, sums = dense_step(model, config, params, sums, batch)
        state, _ = train_step(state, batch)
    ours = {"dense": state.dense_params, "tables": state.tables}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, params)


@pytest.mark.parametrize("table", ["sgd", "rowwise_adagrad"])
def test_micro_batches_equal_one_big_batch(table):
    model, config = tiny_model(), optimizer(table, rate=0.1)
    batch = random_batch(model, 16)
    batch = batch.replace(weight_B=(np.arange(16) < 13).astype(np.float32))
    results = []
    for parts in (1, 2, 4, 16):
        state, metrics = jax.jit(make_train_step(model, LossConfig(), config, parts))(
            init_state(model, config, 0), batch
        )
        results.append((state, metrics["loss"]))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[0], other)


def test_padding_rows_change_nothing():
    model, config = tiny_model(), optimizer("rowwise_adagrad")
    batch = random_batch(model, 8)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.full_like(x, 7)]), batch)
    padded = padded.replace(
        weight_B=np.repeat(np.float32([1, 0]), 8), ids_BxK=np.concatenate([batch.ids_BxK, 0 * batch.ids_BxK - 1])
    )
    step = jax.jit(make_train_step(model, LossConfig(), config))
    short, long = step(init_state(model, config, 0), batch), step(init_state(model, config, 0), padded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), short, long)


def test_what_is_not_a_number_in_a_row_of_weight_zero_reaches_nothing():
    model, config = tiny_model(learned_pooling=True), optimizer("rowwise_adagrad")
    placed = on_one_device(model, config)
    state, batch = placed.init_state(0), random_batch(model, 8, weighted_ids=True)
    batch = batch.replace(weight_B=np.float32([1, 1, 1, 0, 1, 1, 1, 1]))
    columns = {name: np.array(getattr(batch, name)) for name in ("dense_BxN", "label_B", "id_weights_BxK")}
    for column in columns.values():
        column[3] = np.nan
    spoilt = batch.replace(**columns)
    step = jax.jit(make_train_step(model, LossConfig(), config))
    ahead = jax.jit(make_pipelined_step(model, LossConfig(), config, 1, placed.ops))
    route, score = placed.jit_route(lambda batch, _: batch, None), jax.jit(make_eval_step(model, LossConfig()))
    jax.tree.map(np.testing.assert_array_equal, step(state, spoilt), step(state, batch))
    pipelined = [ahead(state, b, route(b, 0), b) for b in (spoilt, batch)]
    jax.tree.map(np.testing.assert_array_equal, *pipelined)
    assert np.isfinite(pipelined[0][1]["loss"])
    sums = [Metrics(), Metrics()]
    sums[0].append(score(state, spoilt))
    sums[1].append(score(state, batch))
    assert sums[0].compute() == sums[1].compute()


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_with_a_threshold_every_metric_is_of_the_probabilities_that_are_predicted(loss):
    model, config = tiny_model(), LossConfig(loss, threshold=0.4)
    state = init_state(model, optimizer(), 0)
    state = state.replace(dense_params=jax.tree.map(lambda x: 3 * x, state.dense_params))
    batch, collected = random_batch(model, 64), Metrics()
    sums = jax.jit(make_eval_step(model, config))(state, batch)
    collected.append(sums)
    values, p, t = collected.compute(), np.float64(sums.prob_B), batch.label_B
    assert ((p < 0.4001) | (p > 0.5999)).sum() > 10
    log_loss = sk.log_loss(t, p)
    wanted = {
        "loss": log_loss if loss == "bce" else ((p - t) ** 2).mean(),
        "auc": sk.roc_auc_score(t, p),
        "log_loss": log_loss,
        "normalized_entropy": log_loss / sk.log_loss(t, np.full(64, t.mean())),
        "calibration": p.sum() / t.sum(),
        "accuracy": sk.accuracy_score(t, p > 0.5),
        "pr_auc": sk.average_precision_score(t, p),
        "brier": sk.brier_score_loss(t, p),
        "num_samples": 64,
    }
    assert values == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("interaction", ["dot", "cross"])
@pytest.mark.sample(1)
def test_bfloat16_keeps_float32_weights_and_comes_close(interaction):
    plain = tiny_model(interaction=interaction, cross_layers=2, cross_rank=3)
    model = dataclasses.replace(plain, compute_dtype="bfloat16")
    state, batch = init_state(plain, optimizer(), 0), random_batch(model, 32)
    wanted, found = (jax.jit(functools.partial(logits, of))(state, batch) for of in (plain, model))
    assert found.dtype == np.float32 and not np.array_equal(found, wanted)
    np.testing.assert_allclose(found, wanted, atol=0.03)
    text = jax.jit(lambda s, b: logits(model, s, b)).lower(state, batch).as_text()
    in_bfloat16 = [line for line in text.splitlines() if "dot_general" in line and "bf16" in line]
    assert len(in_bfloat16) == {"dot": 5, "cross": 8}[interaction]
    stepped, step_metrics = jax.jit(make_train_step(model, LossConfig(), optimizer()))(state, batch)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves((stepped, step_metrics)))
    assert bool(step_metrics["finite"])


def test_logits_are_not_probabilities():
    model = tiny_model()
    state = init_state(model, optimizer(), 0)
    big = jax.tree.map(lambda x: 10 * x, state.dense_params)
    values = np.asarray(logits(model, state.replace(dense_params=big), random_batch(model, 64)))
    assert values.min() < 0 or values.max() > 1


def test_eval_step_reports_the_training_loss_and_leaves_state_alone():
    model, config = tiny_model(), optimizer()
    state = init_state(model, config, 0)
    batch = random_batch(model, 8)
    sums = jax.jit(make_eval_step(model, LossConfig()))(state, batch)
    _, metrics = jax.jit(make_train_step(model, LossConfig(), config))(state, batch)
    np.testing.assert_allclose(sums.loss / sums.weight, metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.sample(1)
def test_an_empty_row_pulls_a_fresh_model_by_half(label):
    """Without biases its logit is exactly 0, where the pieces of the loss have kinks."""
    model, config = tiny_model(dense_init="flax"), optimizer(rate=0.5)
    batch = random_batch(model, 1)
    batch = batch.replace(dense_BxN=0 * batch.dense_BxN, ids_BxK=0 * batch.ids_BxK - 1, label_B=np.float32([label]))
    state, _ = jax.jit(make_train_step(model, LossConfig(), config))(init_state(model, config, 0), batch)
    np.testing.assert_allclose(state.dense_params["top_mlp"]["layer_1"]["bias"], [0.5 * (label - 0.5)])


def test_not_finite_input_is_flagged():
    model, config = tiny_model(), optimizer()
    batch = random_batch(model, 4)
    batch.dense_BxN[2, 1] = np.inf
    _, metrics = jax.jit(make_train_step(model, LossConfig(), config))(init_state(model, config, 0), batch)
    assert not bool(metrics["finite"])


def test_gradient_that_overflows_under_a_finite_loss_is_flagged():
    model, config = tiny_model(bottom_mlp=(4,), top_mlp=(1,)), optimizer()
    state = init_state(model, config, 0)
    params = jax.tree.map(jnp.zeros_like, state.dense_params)
    params["bottom_mlp"]["layer_0"]["bias"] = jnp.ones(4)
    params["top_mlp"]["layer_0"]["kernel"] = jnp.full_like(params["top_mlp"]["layer_0"]["kernel"], 100.0)
    batch = random_batch(model, 4).replace(dense_BxN=np.full((4, 3), 3e38, np.float32), label_B=np.zeros(4, np.float32))
    _, metrics = jax.jit(make_train_step(model, LossConfig(), config))(state.replace(dense_params=params), batch)
    assert np.isfinite(metrics["loss"]) and not bool(metrics["finite"])


def test_same_seed_same_bits_other_seed_other_weights():
    model, config = tiny_model(), optimizer()
    a, b, c = (init_state(model, config, seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert isinstance(c, TrainState)
    assert (
        np.asarray(a.dense_params["top_mlp"]["layer_0"]["kernel"]) != c.dense_params["top_mlp"]["layer_0"]["kernel"]
    ).any()


@pytest.mark.parametrize("init", ["dlrm", "torch", "flax", "xavier"])
def test_dense_init_has_the_stated_scale(init):
    model = tiny_model(num_dense=300, bottom_mlp=(200, 4), dense_init=init)
    layer = init_state(model, optimizer(), 0).dense_params["bottom_mlp"]["layer_0"]
    xavier = (2 / 500) ** 0.5
    std = {"dlrm": xavier, "torch": (1 / 300 / 3) ** 0.5, "flax": (1 / 300) ** 0.5, "xavier": xavier}[init]
    bias_std = {"dlrm": (1 / 200) ** 0.5, "torch": (1 / 300 / 3) ** 0.5, "flax": 0, "xavier": 0}[init]
    np.testing.assert_allclose(np.std(layer["kernel"]), std, rtol=0.03)
    if init == "xavier":  # Not cut off at two deviations.
        assert np.abs(layer["kernel"]).max() > 3.5 * std
    np.testing.assert_allclose(np.std(layer["bias"]), bias_std, rtol=0.2, atol=1e-9)
