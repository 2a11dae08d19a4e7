"""A trained model without batch norms: in use each is linear, so that the product before it can take it in.

    s = scale / sqrt(variance + epsilon)      (x W - mean) s + bias = x (W s) + (bias - mean s)

with the running averages of training as mean and variance. Computed in float64 and rounded once; a logit differs from
that of the norm itself by float32's rounding of a sum.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlrm_jax.config import BATCH_NORM, NO_NORM, NORM_EPSILON, ModelConfig


def folded(
    model: ModelConfig, dense_params: Mapping[str, Any], batch_stats: Mapping[str, Any]
) -> tuple[ModelConfig, Mapping[str, Any]]:
    """(the same model without batch norms, its dense parameters); both as they are where there are none."""
    if not model.has_batch_norm:
        return model, dense_params
    hidden = {name: getattr(model, name) for name in ("bottom_hidden", "top_hidden")}
    without = {name: dataclasses.replace(one, norm=NO_NORM) for name, one in hidden.items() if one.norm == BATCH_NORM}
    return dataclasses.replace(model, **without), _without_norms(dense_params, batch_stats)


def _without_norms(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a module: those of `norm_0` go into `layer_0`, and so in the modules in it."""
    kept = dict(params)
    for name, averages in batch_stats.items():
        if "mean" not in averages:
            kept[name] = _without_norms(params[name], averages)
            continue
        layer, norm = f"layer_{name.removeprefix('norm_')}", kept.pop(name)
        factor_W = np.float64(norm["scale"]) / np.sqrt(np.float64(averages["var"]) + NORM_EPSILON)
        kernel = np.float64(kept[layer]["kernel"]) * factor_W
        bias = np.float64(norm["bias"]) - np.float64(averages["mean"]) * factor_W
        kept[layer] = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
    return kept
