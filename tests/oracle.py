"""The plain oracle: a DLRM as its papers write it, every table a dense parameter, every gradient by autodiff.

It shares no line with the package but the names of the parameters. Under `jax.enable_x64` it computes in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import LossConfig, ModelConfig, OptimizerConfig

ADAM_B1, ADAM_B2, ADAM_EPS = 0.9, 0.999, 1e-8


def mlp(params, x, final_relu: bool):
    for i in range(len(params)):
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"][None]
        if final_relu or i < len(params) - 1:
            x = jnp.where(x > 0, x, 0)
    return x


def pooled(model: ModelConfig, tables, batch):
    """One (B, D) array a feature: how often, and with what weight, each example has each row, times the table."""
    vectors, first = [], 0
    for feature in model.features:
        slots = slice(first, first := first + feature.hotness)
        ids, table = batch.ids_BxK[:, slots], tables[feature.table]
        shares_BxhxR = 1.0 * (ids[:, :, None] == np.arange(len(table))[None, None])
        if batch.id_weights_BxK is not None:
            shares_BxhxR *= batch.id_weights_BxK[:, slots, None]
        if model.learned_pooling:
            shares_BxhxR *= tables[f"{feature.table}/pooling_weights"][None, None, :, 0]
        sums = shares_BxhxR.sum(axis=1) @ table
        count_Bx1 = (ids >= 0).sum(axis=1, keepdims=True)
        vectors.append(sums / jnp.maximum(count_Bx1, 1) if feature.pooling == "mean" else sums)
    return vectors


def logits(model: ModelConfig, params, batch):
    dense = params["dense"]
    numbers = [mlp(dense["bottom_mlp"], batch.dense_BxN, True)] if model.bottom_mlp else []
    columns = range(model.num_dense) if model.embed_numbers else model.embedded_columns
    embedded = [batch.dense_BxN[:, n : n + 1] * dense["numbers"]["vectors"][i][None] for i, n in enumerate(columns)]
    x = interaction(model, dense, numbers, numbers + pooled(model, params["tables"], batch) + embedded)
    return mlp(dense["top_mlp"], x, False)[:, 0]


def interaction(model: ModelConfig, dense, numbers, vectors):
    """(B, I) of each kind of interaction; `numbers` is the bottom MLP's output, or empty, the first of `vectors`."""
    name, options = model.interaction.name, model.interaction.options
    own, together = dense.get(name), jnp.concatenate(vectors, axis=1)
    if name == "dot":
        last = 1 if options.get("self_interaction") else 0
        dots = [(v * w).sum(axis=1) for i, v in enumerate(vectors) for w in vectors[: i + last]]
        return jnp.concatenate([*numbers, jnp.stack(dots, axis=1)], axis=1)
    if name == "fm":
        pairs = [v * w for i, v in enumerate(vectors) for w in vectors[:i]]
        return jnp.concatenate([*numbers, sum(pairs, start=0 * vectors[0])], axis=1)
    if name == "projection":
        dim = vectors[0].shape[1]
        left, right = (mlp(own[branch], together, True) for branch in ("branch1", "branch2"))
        rows, columns = left.shape[1] // dim, right.shape[1] // dim
        dots = [
            sum(left[:, p * dim + d] * right[:, d * columns + q] for d in range(dim))
            for p in range(rows)
            for q in range(columns)
        ]
        return jnp.concatenate([*numbers, jnp.stack(dots, axis=1)], axis=1)
    if name.startswith("parallel_"):
        return jnp.concatenate([crossed(own["cross"], together), mlp(own["tower"], together, True)], axis=1)
    return together if name == "cat" else crossed(own, together)


def crossed(params, x0):
    """Cross layers, of low rank where there is a `v_0`."""
    x = x0
    for i in range(sum(name.startswith("w_") for name in params)):
        low = x @ params[f"v_{i}"] if f"v_{i}" in params else x
        x = x0 * (low @ params[f"w_{i}"] + params[f"b_{i}"][None]) + x
    return x


def example_loss(model: ModelConfig, loss: LossConfig, params, example):
    """The loss of an example, a batch of one row, times its weight."""
    z, label = logits(model, params, example)[0], example.label_B[0]
    p = jax.nn.sigmoid(z)
    if loss.threshold > 0:
        p = jnp.clip(p, loss.threshold, 1 - loss.threshold)
    if loss.name == "mse":
        value = (p - label) ** 2
    elif loss.threshold > 0:
        value = -label * jnp.log(p) - (1 - label) * jnp.log(1 - p)
    else:
        value = label * jnp.logaddexp(0, -z) + (1 - label) * jnp.logaddexp(0, z)
    if loss.name == "wbce":
        value *= jnp.where(label == 1, loss.class_weights[1], loss.class_weights[0])
    return value * example.weight_B[0]


def gradients(model: ModelConfig, loss: LossConfig, params, batch):
    """(loss, its gradient, and of each of its numbers the sum of the examples' absolute parts)."""
    examples = jax.tree.map(lambda column: column[:, None], batch)
    one = jax.value_and_grad(lambda params, example: example_loss(model, loss, params, example))
    each = jax.vmap(one, in_axes=(None, 0))(params, examples)
    value, grads = jax.tree.map(lambda parts: parts.sum(axis=0) / batch.weight_B.sum(), each)
    sizes = jax.tree.map(lambda parts: jnp.abs(parts).sum(axis=0) / batch.weight_B.sum(), each[1])
    return value, grads, sizes


def update(kind: str, config: OptimizerConfig, step: int, w, g, state):
    """(new weights, new state) of one array, by the textbook; `state` is {} before the first step."""
    rate = config.schedule.learning_rate
    if kind == "sgd":
        return w - rate * g, state
    if kind == "momentum":
        trace = config.momentum * state.get("trace", 0) + g
        return w - rate * trace, {"trace": trace}
    if kind in ("adagrad", "rowwise_adagrad"):
        square = g**2 if kind == "adagrad" else (g**2).mean(axis=1, keepdims=True)
        total = state.get("sum", 0) + square
        return w - rate * g / (jnp.sqrt(total) + config.eps), {"sum": total}
    mu = ADAM_B1 * state.get("mu", 0) + (1 - ADAM_B1) * g
    nu = ADAM_B2 * state.get("nu", 0) + (1 - ADAM_B2) * g**2
    change = mu / (1 - ADAM_B1 ** (step + 1)) / (jnp.sqrt(nu / (1 - ADAM_B2 ** (step + 1))) + ADAM_EPS)
    decay = config.weight_decay if kind == "adamw" else 0
    return w - rate * (change + decay * w), {"mu": mu, "nu": nu}


def bounded(config: OptimizerConfig, params, grads):
    """The gradients with L2, together of no greater norm than `clip_norm`."""
    l2 = {"dense": config.dense_l2, "tables": config.table_l2}
    grads = {part: jax.tree.map(lambda g, w, l2=l2[part]: g + l2 * w, grads[part], params[part]) for part in l2}
    if not config.clip_norm:
        return grads
    norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.minimum(1, config.clip_norm / (norm + 1e-6)), grads)


def make_step(model: ModelConfig, loss: LossConfig, config: OptimizerConfig):
    """`(params, states, number of the step, batch) -> (params, states, loss)`; `states` starts as {}."""

    def step(params, states, number, batch):
        value, grads, _ = gradients(model, loss, params, batch)
        new, new_states = {}, {}
        grads = bounded(config, params, grads)
        for part, kind in (("dense", config.dense), ("tables", config.table)):
            leaves, tree = jax.tree.flatten(params[part])
            g_leaves = jax.tree.leaves(grads[part])
            olds = states.get(part) or [{}] * len(leaves)
            pairs = [update(kind, config, number, *of) for of in zip(leaves, g_leaves, olds, strict=True)]
            new[part] = jax.tree.unflatten(tree, [w for w, _ in pairs])
            new_states[part] = [state for _, state in pairs]
        return new, new_states, value

    return step
