"""Tests `dlrm_jax/model/schedule.py`."""

import numpy as np
import pytest

from dlrm_jax.config import ScheduleConfig
from dlrm_jax.model.schedule import make_schedule


def rates(steps: int, **fields) -> np.ndarray:
    schedule = make_schedule(ScheduleConfig(learning_rate=1.0, **fields))
    return np.array([float(schedule(step)) for step in range(steps)])


def test_constant_by_default():
    np.testing.assert_array_equal(rates(3), 1)


def test_warm_up_plateau_decay_end():
    actual = rates(12, warmup_steps=4, decay_start_step=6, decay_steps=4, end_learning_rate=0.01)
    np.testing.assert_allclose(actual, [0.25, 0.5, 0.75, 1, 1, 1, 0.5625, 0.25, 0.0625, 0.01, 0.01, 0.01], rtol=1e-6)


def test_reference_quirks_as_recorded():
    actual = rates(11, warmup_steps=4, decay_start_step=6, decay_steps=4, compat="dlrm")
    expected = [0.25, 0.5, 0.75, 0.75, 0.75, 1, 0.5625, 0.25, 0.0625, 0.0625, 0.0625]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_reference_without_decay_has_no_quirk():
    np.testing.assert_allclose(rates(5, warmup_steps=4, compat="dlrm"), [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_decay_follows_its_power(power):
    actual = rates(5, decay_start_step=1, decay_steps=4, decay_power=power)
    np.testing.assert_allclose(actual, [1, 0.75**power, 0.5**power, 0.25**power, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("decay", "expected"), [("linear", [1, 0.775, 0.55, 0.325, 0.1]), ("cosine", [1, 0.868198, 0.55, 0.231802, 0.1])]
)
def test_other_decays_end_where_they_should(decay, expected):
    actual = rates(7, decay_start_step=2, decay_steps=4, end_learning_rate=0.1, decay=decay)
    np.testing.assert_allclose(actual, [1, *expected, 0.1], rtol=1e-5)
