"""Every table optimizer against its dense formula, and the one table of properties that each rule has to pass.

The other properties stand where their subject is: placements in placement_test.py, other plans in reshard_test.py,
memory that does not grow with rows in row_free_test.py, resuming in resume_test.py, predicted memory in cost_test.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.tables.rules import row_means
from dlrm_jax.tables.updates import BagGrad, SparseGrad, Stored, Update
from tests.helpers import RULES, optimizer

V, D, RATE = 6, 3, 0.1
BOUNDS = {
    "l2": {"table_l2": 0.3},
    "clip": {"table_clip_norm": 0.5},
    "clip values": {"clip_value": 0.2},
    "decay": {"table_weight_decay": 0.2},
    "norm": {"table_max_norm": 0.7},
    "all": {"table_l2": 0.3, "table_clip_norm": 0.5, "table_weight_decay": 0.2, "table_max_norm": 0.7},
}


def rule_of(name, **bounds):
    return make_rule(dataclasses.replace(optimizer(name), **bounds))


def stored(rule, seed=0):
    weights = jax.random.normal(jax.random.key(seed), (V, D))
    return Stored(weights, {s.name: jnp.full((V, s.width(D)), s.first, s.dtype) for s in rule.slots})


def gradient(seed, rows):
    """Two to three slots of each of these rows, and void ones."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.concatenate([np.repeat(rows, 2), rows[:2], [-1, V]])).astype(np.int32)
    return SparseGrad(jnp.asarray(ids), jnp.asarray(rng.normal(size=(len(ids), D)), jnp.float32))


def dense(grad):
    total = np.zeros((V, D))
    for row, value in zip(np.asarray(grad.ids_M), np.asarray(grad.rows_MxD), strict=True):
        if 0 <= row < V:
            total[row] += value
    return total


def jitted(rule):
    return jax.jit(lambda grad, now, t: Update(rule, jnp.float32(RATE), t).by_rows(grad, now))


def formula(name, kept, w, g, t):
    """The textbook update of a whole table, in float64; `kept` is changed in place."""
    kind, _, options = name.partition(",")
    if kind == "sgd":
        return -RATE * g
    if kind == "momentum":
        kept["m"] = 0.9 * kept.get("m", 0) + g
        return -RATE * kept["m"]
    if kind in ("adagrad", "rowwise_adagrad"):
        square = g**2 if kind == "adagrad" else (g**2).mean(axis=1, keepdims=True)
        kept["s"] = kept.get("s", 0) + square
        return -RATE * g / (np.sqrt(kept["s"]) + 1e-10)
    if kind == "rmsprop":
        kept["v"] = 0.99 * kept.get("v", 0) + 0.01 * g**2
        return -RATE * g / (np.sqrt(kept["v"]) + 1e-8)
    if kind in ("adam", "rowwise_adam"):
        b1 = 0.8 if "b1=0.8" in options else 0.9
        square = g**2 if kind == "adam" else (g**2).mean(axis=1, keepdims=True)
        kept["m"] = b1 * kept.get("m", 0) + (1 - b1) * g
        kept["v"] = 0.999 * kept.get("v", 0) + 0.001 * square
        return -RATE * kept["m"] / (1 - b1**t) / (np.sqrt(kept["v"] / (1 - 0.999**t)) + 1e-8)
    assert kind == "ftrl"
    l1 = 0.5
    n = kept.get("n", 0.1)
    z = kept.get("z", 0) + g - (np.sqrt(n + g**2) - np.sqrt(n)) / RATE * w
    kept["n"], kept["z"] = n + g**2, z
    new = np.where(np.abs(z) <= l1, 0, -(z - np.sign(z) * l1) / ((1 + np.sqrt(n + g**2)) / RATE))
    return new - w


def bounded(bounds, update, w, g):
    """`update(g) -> added`, between the bounds."""
    g = g + bounds.get("table_l2", 0) * w
    if bound := bounds.get("clip_value"):
        g = np.clip(g, -bound, bound)
    if clip := bounds.get("table_clip_norm"):
        g = g * np.minimum(1, clip / np.linalg.norm(g, axis=1, keepdims=True))
    new = w + update(g) - RATE * bounds.get("table_weight_decay", 0) * w
    if most := bounds.get("table_max_norm"):
        new = new * np.minimum(1, most / np.linalg.norm(new, axis=1, keepdims=True))
    return new


@pytest.mark.parametrize(
    ("name", "bounds"),
    [*((name, {}) for name in RULES), *((name, BOUNDS[b]) for name in ("sgd", "adam") for b in BOUNDS)],
)
@pytest.mark.sample(8)
def test_where_all_rows_are_touched_an_update_is_the_dense_formula(name, bounds):
    rule = rule_of(name, **bounds)
    now, kept = stored(rule), {}
    expected = np.asarray(now.weights, np.float64)
    step = jitted(rule)
    for t in range(1, 5):
        grad = gradient(t, np.arange(V))
        now = step(grad, now, t)
        expected = bounded(bounds, lambda g, w=expected, t=t: formula(name, kept, w, g, t), expected, dense(grad))
    np.testing.assert_allclose(now.weights, expected, rtol=2e-5, atol=2e-6)
    if name.startswith("ftrl"):
        assert (np.asarray(now.weights) == 0).any() and (expected == 0).any()


@pytest.mark.parametrize("name", ["adam", "adam,b1=0.8"])
def test_adam_with_decay_is_adamw_of_optax(name):
    rule = rule_of(name, table_weight_decay=0.2)
    theirs = optax.adamw(RATE, b1=0.8 if "0.8" in name else 0.9, weight_decay=0.2)
    now = stored(rule)
    step, their_step = jitted(rule), jax.jit(theirs.update)
    weights, state = now.weights, theirs.init(now.weights)
    for t in range(1, 4):
        grad = gradient(t, np.arange(V))
        now = step(grad, now, t)
        updates, state = their_step(jnp.asarray(dense(grad), jnp.float32), state, weights)
        weights = optax.apply_updates(weights, updates)
    # optax takes 1 - b^t in float32, which keeps few digits for b near 1.
    np.testing.assert_allclose(now.weights, weights, rtol=1e-4, atol=1e-5)


def test_bias_is_corrected_by_the_step_or_by_each_rows_own_updates():
    """Row 5 is touched in the third step alone: by its own count that is as if the run had just begun."""
    late = SparseGrad(jnp.array([5]), jnp.ones((1, D)))
    moved = {}
    for by in ("step", "row"):
        rule = rule_of(f"adam,correct_by={by}")
        start = stored(rule)
        now = jitted(rule)(late, start, 3)
        moved[by] = float((start.weights - now.weights)[5, 0])
    assert moved["row"] == pytest.approx(RATE, rel=1e-5)
    assert moved["step"] == pytest.approx(RATE * (0.1 / (1 - 0.9**3)) / (0.001 / (1 - 0.999**3)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("bounds", [{}, BOUNDS["all"]])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.sample(6)
def test_rows_that_are_not_looked_up_keep_their_bits(name, bounds):
    rule = rule_of(name, **bounds)
    before = stored(rule)
    grad = SparseGrad(jnp.array([2, 2, -1, V]), jnp.ones((4, D)))
    after = jitted(rule)(grad, before, 1)
    untouched = np.arange(V) != 2
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(new[untouched], old[untouched])
        assert (np.asarray(new[2]) != np.asarray(old[2])).all()


@pytest.mark.parametrize("piece", [1, 3, 4096])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.sample(8)
def test_an_update_by_bags_is_that_by_rows(name, scaled, piece, monkeypatch):
    """Ids that fill several pieces, that end with one, and void ones; bags of two hotnesses; nobody names row 0."""
    monkeypatch.setattr("dlrm_jax.tables.updates.PIECE", piece)
    rng, bags, ids, rows = np.random.default_rng(piece), [], [], []
    for hotness, count in ((3, 4), (1, 5)):
        bag_ids = rng.integers(-1, V + 1, (hotness, count)).astype(np.int32)
        bag_ids[bag_ids == 0] = -1
        scale = rng.random((hotness, count)).astype(np.float32) if scaled else np.ones((hotness, count), np.float32)
        d_bags = rng.normal(size=(count, D)).astype(np.float32)
        bags.append(BagGrad(jnp.asarray(bag_ids), jnp.asarray(scale) if scaled else None, jnp.asarray(d_bags)))
        ids.append(bag_ids.reshape(-1))
        rows.append((scale[:, :, None] * d_bags[None]).reshape(-1, D))
    grad = SparseGrad(jnp.asarray(np.concatenate(ids)), jnp.asarray(np.concatenate(rows)))
    update = Update(rule_of(name), jnp.float32(RATE), jnp.int32(2))
    start = jax.tree.map(lambda x: x + jnp.asarray(1, x.dtype), stored(update.rule))
    actual, expected = jax.jit(update.by_bags)(tuple(bags), start), jax.jit(update.by_rows)(grad, start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_means_over_rows_are_counted():
    assert [row_means(rule_of(name)) for name in ("sgd", "adam", "rowwise_adam", "rowwise_adagrad")] == [0, 0, 1, 1]
    assert row_means(rule_of("adam", table_clip_norm=1.0, table_max_norm=1.0)) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lamb", r"^table_optimizer is 'lamb'; choose one of sgd, momentum, adagrad,"),
        ("adam,beta=1", r"adam has no option 'beta'; its options: b1, b2, eps, correct_by$"),
        ("sgd,b1=1", r"sgd has no option 'b1'; its options: none$"),
        ("adam,b1=big", r"b1 is 'big'; it must be a number$"),
        ("adam,eps=-1", r"eps must be 0 or more, and finite$"),
        ("adam,eps=nan", r"eps must be 0 or more, and finite$"),
        ("adam,b2=1", r"b2 is 1.0; it must be below 1$"),
        ("momentum,momentum=1", r"momentum is 1.0; it must be below 1$"),
        ("adam,correct_by=table", r"correct_by is 'table'; choose step or row$"),
    ],
)
def test_a_rule_that_cannot_be_is_one_line(name, message):
    with pytest.raises(ConfigError, match=message):
        rule_of(name)
