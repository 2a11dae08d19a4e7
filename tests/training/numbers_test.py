"""Random models under random plans: equal to the plain oracle in float64, and in float32 as closely as is promised.

In float64 rounding is 5e8 times smaller than in float32: what differs there is a fault, whatever the optimizer, the
learning rate or the depth would make of rounding.
"""

import dataclasses

import jax
import numpy as np
import pytest

from dlrm_jax.config import OptimizerConfig, ScheduleConfig
from tests import oracle
from tests.random_models import Case, cast, draw, make_gradients, make_oracle, make_trainer

STEPS, TRIALS = 6, 3
ROUNDING = 2.0**-24
GRADIENTS_APART = 64
"""In roundings of the sum of a gradient's terms, whatever the optimizer (docs/DEVICES.md)."""


def weights_apart(optimizer: OptimizerConfig) -> float:
    """Of the largest weight, after STEPS steps at a rate of 1/16; more where a gradient is divided by its own size."""
    linear = optimizer.table == "sgd" and optimizer.dense in ("sgd", "momentum")
    return 1e-6 if linear else 1e-5


ADAMS_EPSILON, APART_AT_EPSILON = 1e-8, 2e-5
"""Adam moves a weight whose first gradient is as small as its epsilon by up to rate / 4 per epsilon of difference: here
1.3e-5 for each rounding of terms of 1e-4."""


def seeds(*daily: int):
    """`daily` always, some of the slow tests, and many more only when asked for.

    Together 11, 27 and 48 have every sharding type, loss and optimizer of tables, copies, micro-batches, several rounds
    of the exchange and rows in lines.
    """
    slow = {0, 11, 15, 27, 48} - set(daily)
    rest = set(range(60)) - slow - set(daily)
    return [
        *daily,
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in sorted(slow)),
        *(pytest.param(seed, marks=(pytest.mark.slow, pytest.mark.exhaustive)) for seed in sorted(rest)),
    ]


def differences(ours: list[dict], theirs: list[dict], among: dict | None = None) -> list[float]:
    """After each step the largest difference of any weight over the largest weight, until training diverges.

    `among` says which weights count; None: all.
    """
    found = []
    for our, their in zip(ours, theirs, strict=True):
        pairs = list(zip(jax.tree.leaves(our), jax.tree.leaves(their), strict=True))
        largest = max(np.abs(b).max() for _, b in pairs)
        if not largest < 1e4:
            break
        counted = [True] * len(pairs) if among is None else jax.tree.leaves(among)
        apart = (np.abs(a - b).max(initial=0, where=which) for (a, b), which in zip(pairs, counted, strict=True))
        found.append(float(max(apart) / largest))
    return found


def assert_is_the_oracle(case: Case):
    ours, plain = make_trainer(case, "float64"), make_oracle(case)
    for trial in range(TRIALS):
        trained = ours(case.again(trial), STEPS)
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype("float64")}
        found = differences(trained, plain(case.again(trial), STEPS))
        assert found and max(found) < 1e-8, f"{case}, trial {trial}: {found}"


@pytest.mark.parametrize("seed", seeds(11, 27))
@pytest.mark.sample(1)
def test_every_placement_is_the_oracle_in_float64(seed):
    assert_is_the_oracle(draw(seed))


@pytest.mark.parametrize("seed", seeds(48))
@pytest.mark.sample(2)
def test_one_device_is_the_oracle_in_float64(seed):
    assert_is_the_oracle(draw(seed).on_one_device())


ALL = {"table_update": "all", "table_l2": 0.05, "dense_l2": 0.02, "clip_norm": 0.3}


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (11, {"table": "adagrad", "clip_norm": 0.3}),
        (15, {"table": "momentum", **ALL}),
        pytest.param(27, {"table": "adam", **ALL}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(1)
def test_bounded_norms_and_updates_of_all_rows_are_the_oracle_in_float64(seed, settings):
    """The oracle's tables are dense parameters, whose moments decay and whose rows L2 pulls in every step."""
    case = draw(seed)
    model = dataclasses.replace(case.model, learned_pooling=False)
    optimizer = dataclasses.replace(case.optimizer, dense="momentum", weight_decay=0.0, **settings)
    assert_is_the_oracle(dataclasses.replace(case, model=model, optimizer=optimizer))


@pytest.mark.parametrize("seed", seeds(27))
@pytest.mark.sample(1)
def test_gradients_in_float32_are_right_to_rounding_of_their_terms(seed):
    case = draw(seed)
    ours = make_gradients(case)
    exact = jax.jit(lambda params, batch: oracle.gradients(case.model, case.loss, params, batch)[1:])
    for trial in range(TRIALS):
        again = case.again(trial)
        params = again.params()
        with jax.enable_x64(True):
            wanted, terms = exact(jax.tree.map(np.float64, params), cast(again.batch(0), "float64"))
        found = jax.tree.map(
            lambda g, w, t, p: _roundings(g, np.asarray(w), np.asarray(t), p), ours(again), wanted, terms, params
        )
        assert max(jax.tree.leaves(found)) < GRADIENTS_APART, f"{case}, trial {trial}: {found}"


def _roundings(ours, wanted, terms, weights) -> float:
    """The largest error of a gradient in roundings of the array's largest sum of terms.

    A table's are read off its weights, and round as these do.
    """
    return float((np.abs(ours - wanted) / (ROUNDING * (terms.max() + np.abs(weights)) + 1e-37)).max())


@pytest.mark.parametrize("seed", seeds(11))
@pytest.mark.sample(1)
def test_weights_in_float32_stay_as_close_as_is_promised(seed):
    case = draw(seed)
    gentle = dataclasses.replace(case.optimizer, schedule=ScheduleConfig(learning_rate=1 / 16))
    case = dataclasses.replace(case, optimizer=gentle)
    ours, one, gradients = make_trainer(case), make_trainer(case.on_one_device()), make_gradients(case.on_one_device())
    by_adam = case.optimizer.dense in ("adam", "adamw")
    for trial in range(TRIALS):
        weights = ours(case.again(trial), STEPS), one(case.again(trial), STEPS)
        first = gradients(case.again(trial))
        small = {
            "dense": jax.tree.map(lambda g: by_adam & (np.abs(g) < 10 * ADAMS_EPSILON), first["dense"]),
            "tables": jax.tree.map(lambda g: np.zeros(g.shape, bool), first["tables"]),
        }
        found = differences(*weights, jax.tree.map(np.logical_not, small))
        assert found and max(found) < weights_apart(case.optimizer), f"{case}, trial {trial}: {found}"
        at_epsilon = differences(*weights, small)
        assert max(at_epsilon) < APART_AT_EPSILON, f"{case}, trial {trial}, at Adam's epsilon: {at_epsilon}"
