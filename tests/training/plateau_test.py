"""Tests `dlrm_jax/training/plateau.py`: when the rate is cut, and that a run which goes on has cut as often."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError, ScheduleConfig
from dlrm_jax.config.learning import Plateau, parse_plateau
from dlrm_jax.training import loop
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.plateau import Stall, cut_where_stalled
from dlrm_jax.training.reporting import read_metrics
from tests.helpers import optimizer, tiny_model
from tests.training.resume_test import CONFIG, assert_same_bits, final_state


def factors(values: list[float], text: str, rate: float = 1.0, smaller_is_better: bool = False) -> list[float]:
    """The factor behind each evaluation."""
    schedule, stall, found = ScheduleConfig(rate, plateau=text), Stall(), []
    settings = dataclasses.replace(optimizer(), schedule=schedule)
    state = on_one_device(tiny_model(), settings).init_state(0)
    for value in values:
        state = cut_where_stalled(schedule, stall, value, smaller_is_better, state)
        found.append(float(state.rate_factor))
    return found


@pytest.mark.parametrize(
    ("values", "text", "smaller", "expected"),
    [
        ([0.7, 0.74, 0.74, 0.75, 0.75], "factor:0.1", False, [1, 1, 0.1, 0.1, 0.01]),
        ([0.7, 0.7, 0.7, 0.7, 0.7], "factor:0.5,patience:1", False, [1, 1, 0.5, 0.5, 0.25]),
        ([0.7, 0.7005, 0.702, 0.702], "factor:0.5,min_delta:0.001", False, [1, 0.5, 0.5, 0.25]),
        ([0.7, 0.6, 0.65, float("nan")], "factor:0.5", True, [1, 1, 0.5, 0.25]),
        ([0.7, 0.7, 0.7, 0.7], "factor:0.1,min:0.05", False, [1, 0.1, 0.05, 0.05]),
    ],
)
def test_the_rate_is_cut_where_evaluations_stall(values, text, smaller, expected):
    np.testing.assert_allclose(factors(values, text, smaller_is_better=smaller), expected, rtol=1e-6)


def test_the_least_rate_is_a_rate_not_a_factor():
    np.testing.assert_allclose(factors([0.7] * 4, "min:2e-3", rate=0.1), [1, 0.1, 0.02, 0.02], rtol=1e-6)


@given(st.builds(Plateau, st.floats(0.01, 0.99), st.integers(0, 9), st.floats(0, 1), st.floats(0, 1)))
def test_what_a_flag_says_is_read_back(plateau):
    text = ",".join(f"{name}:{value!r}" for name, value in dataclasses.asdict(plateau).items())
    assert parse_plateau(text) == plateau


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("factor", "factor is ''; it must be a number"),
        ("patience:0.5", "patience is '0.5'; it must be a number"),
        ("factor:1", r"factor is 1.0; it must lie in \(0, 1\)"),
        ("speed:1", "'speed' is not among factor, patience, min_delta, min"),
    ],
)
def test_a_plateau_that_cannot_be_is_one_line(text, words):
    with pytest.raises(ConfigError, match=f"lr_plateau={text}: {words}"):
        ScheduleConfig(0.1, plateau=text)


@pytest.mark.exhaustive
def test_a_run_that_was_stopped_goes_on_with_the_cuts_it_had(tmp_path):
    """The factor is in the checkpoint: the weights are those of a run that nobody stopped."""
    schedule = dataclasses.replace(CONFIG.optimizer.schedule, plateau="factor:0.5,min_delta:1")
    config = dataclasses.replace(
        CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, schedule=schedule), num_steps=40, eval_every=10
    )
    loop.train_and_evaluate(config, tmp_path / "whole")
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "whole") if line["split"] == "train"]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.005, 0.0025], rtol=1e-6)
    loop.train_and_evaluate(dataclasses.replace(config, num_steps=20), tmp_path / "parts")
    loop.train_and_evaluate(config, tmp_path / "parts")
    whole = final_state(tmp_path / "whole", config)
    assert float(whole.rate_factor) == 0.125, "a cut behind each evaluation but the first"
    assert_same_bits(whole, final_state(tmp_path / "parts", config))


def test_a_plateau_is_not_put_on_a_run_without_one(tmp_path):
    """Its factor is in no checkpoint: what cannot be read is not blamed on the checkpoint."""
    config = dataclasses.replace(CONFIG, num_steps=2, allow_schedule_change=True)
    loop.train_and_evaluate(config, tmp_path)
    schedule = dataclasses.replace(config.optimizer.schedule, plateau="factor:0.5")
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule=schedule))
    with pytest.raises(ConfigError, match="was trained without --lr_plateau, and goes on so"):
        loop.train_and_evaluate(other, tmp_path)
