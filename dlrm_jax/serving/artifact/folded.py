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
    """(the same model without batch norms, its dense parameters); both as they are where there are none.

    ValueError where a batch norm has no running averages.
    """
    if not model.has_batch_norm:
        return model, dense_params
    hidden = {name: getattr(model, name) for name in ("bottom_hidden", "top_hidden")}
    without = {name: dataclasses.replace(one, norm=NO_NORM) for name, one in hidden.items() if one.norm == BATCH_NORM}
    return dataclasses.replace(model, **without), _without_norms(dense_params, batch_stats, "")


def _without_norms(params: Mapping[str, Any], batch_stats: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The parameters of a module at `path`: those of `norm_0` go into `layer_0`, and so in the modules in it."""
    kept: dict[str, Any] = {}
    for name, value in params.items():
        norm = name.replace("layer_", "norm_")
        if name in batch_stats and "mean" in batch_stats[name]:
            continue
        if not isinstance(value, Mapping):
            kept[name] = value
        elif norm != name and norm in params and "bias" not in value:  # A batch norm follows (model/mlp.py).
            if norm not in batch_stats:
                raise ValueError(f"{path}{norm} has no running averages: give batch_stats")
            kept[name] = _joined(value["kernel"], params[norm], batch_stats[norm])
        else:
            kept[name] = _without_norms(value, batch_stats.get(name, {}), f"{path}{name}/")
    return kept


def _joined(kernel: Any, norm: Mapping[str, Any], averages: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One product in place of a product and its batch norm."""
    factor_W = np.asarray(norm["scale"], np.float64) / np.sqrt(np.asarray(averages["var"], np.float64) + NORM_EPSILON)
    kernel = np.asarray(kernel, np.float64) * factor_W
    bias = np.asarray(norm["bias"], np.float64) - np.asarray(averages["mean"], np.float64) * factor_W
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
