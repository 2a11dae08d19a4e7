"""Tests `dlrm_jax/training/temperature.py`: probabilities that fit val, and nothing else that is another."""

import dataclasses

import jax
import numpy as np
import pytest

from dlrm_jax.model.metrics import Scored
from dlrm_jax.training import checkpoint, loop
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.temperature import fitted_factor
from tests.training.resume_test import CONFIG, assert_same_bits, final_state


def test_what_was_promised_three_times_too_surely_is_taken_back():
    logit_R = np.linspace(-4, 3, 50, dtype=np.float32)
    label_R = 1 / (1 + np.exp(-logit_R))  # As if each row stood for many.
    rows = Scored(3 * logit_R, label_R, label_R, np.linspace(0, 2, 50, dtype=np.float32))
    assert fitted_factor(rows) == pytest.approx(1 / 3, abs=1e-4)


def test_the_best_checkpoint_fits_val_and_the_training_is_as_without(tmp_path):
    config = dataclasses.replace(CONFIG, fit_temperature=True)
    plain, fitted = (loop.train_and_evaluate(one, tmp_path / str(one is config)) for one in (CONFIG, config))
    assert fitted["step"] == plain["step"] and fitted["val"]["log_loss"] < plain["val"]["log_loss"] - 1e-5
    assert fitted["test"]["auc"] == pytest.approx(plain["test"]["auc"], abs=1e-6)
    assert_same_bits(final_state(tmp_path / "True", config), final_state(tmp_path / "False", CONFIG))
    placed = open_run(config, tmp_path / "True").place(checkpoint.COPIES)
    bests = []
    for name in ("False", "True"):
        with checkpoint.Checkpoints(tmp_path / name) as checkpoints:
            bests.append(checkpoints.restore(checkpoint.BEST, placed).dense_params)
    different = jax.tree.map(lambda a, b: bool((a != b).any()), *bests)
    last = f"layer_{len(CONFIG.model.top_mlp) - 1}"
    assert different["top_mlp"].pop(last) == {"bias": True, "kernel": True}
    assert not any(jax.tree.leaves(different))
