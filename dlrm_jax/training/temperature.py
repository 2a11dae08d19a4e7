"""Temperature scaling (arXiv:1706.04599, section 4.2): logits times the one number that makes val's log loss least.

Ranks, and so every AUC, stay; a model that was trained until its AUC no longer rose promises too surely, and then no
longer does. The number goes into the last layer, in which the logit is linear: exports and servers see plain weights.
"""

import jax
import numpy as np
from scipy.optimize import minimize_scalar

from dlrm_jax.config import ModelConfig
from dlrm_jax.model.metrics import Scored
from dlrm_jax.training.state import TrainState

_BOUNDS = 0.01, 10.0
"""What a factor may be: beyond, as where val has one class, there is nothing to fit."""


def fitted_factor(rows: Scored) -> float:
    """What to multiply the logits of these rows with: one over the temperature."""
    logit_R, label_R, weight_R = (c.astype(np.float64) for c in (rows.logits_R, rows.label_R, rows.weight_R))

    def log_loss(factor: float) -> float:
        return float(weight_R @ (np.logaddexp(0, factor * logit_R) - label_R * factor * logit_R) / weight_R.sum())

    return float(minimize_scalar(log_loss, bounds=_BOUNDS, method="bounded", options={"xatol": 1e-6}).x)


def with_logits_times(factor: float, state: TrainState, model: ModelConfig) -> TrainState:
    """The same model, whose logits are `factor` times as large."""
    last, top = f"layer_{len(model.top_mlp) - 1}", dict(state.dense_params["top_mlp"])
    top[last] = jax.tree.map(lambda weights: weights * np.float32(factor), top[last])
    return state.replace(dense_params={**state.dense_params, "top_mlp": top})
