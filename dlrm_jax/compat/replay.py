"""A recorded run of the reference, trained on again, and how far the two end apart."""

import argparse
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dlrm_jax.compat.reference_flags import parse_reference_flags
from dlrm_jax.compat.weights import infer_model, load_reference_state, num_features, save_reference_state
from dlrm_jax.config import ConfigError, LossConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.data.batch import Batch, pack_bags
from dlrm_jax.training.step import make_train_step

LOSS_TOLERANCE = 2e-6
LARGE_LOSS_TOLERANCE = 1e-5
"""Of quotient-remainder tables: the reference draws them around 1/2, so that logits are sums of dots of up to 180."""
WEIGHT_TOLERANCE = 5e-6
ADAPTIVE_WEIGHT_TOLERANCE = 2e-5


def reference_configs(
    flags: argparse.Namespace, arrays: Mapping[str, Any], hotness: tuple[int, ...]
) -> tuple[ModelConfig, LossConfig, OptimizerConfig]:
    """Our configuration of what the reference does under `flags` with the weights `arrays`."""
    optimizers = {"sgd": "sgd", "adagrad": "adagrad", "rwsadagrad": "rowwise_adagrad"}
    if flags.optimizer not in optimizers:
        raise ConfigError(f"reference optimizer {flags.optimizer!r} is not supported; one of {', '.join(optimizers)}")
    meets = {"interaction": flags.arch_interaction_op, "self_interaction": flags.arch_interaction_itself}
    model = infer_model(arrays, hotness, flags.qr_operation, **meets)
    low, high = (float(weight) for weight in flags.loss_weights.split("-"))
    loss = LossConfig(flags.loss_function, (low, high), flags.loss_threshold if flags.loss_threshold < 1 else 0.0)
    schedule = ScheduleConfig(
        learning_rate=flags.learning_rate,
        warmup_steps=flags.lr_num_warmup_steps,
        decay_start_step=flags.lr_decay_start_step,
        decay_steps=flags.lr_num_decay_steps,
        compat="dlrm",
    )
    table = optimizers[flags.optimizer]
    return model, loss, OptimizerConfig(schedule, dense="sgd" if table == "sgd" else "adagrad", table=table)


class Replay(NamedTuple):
    """Worst absolute differences of a replayed trajectory from the recorded one."""

    loss_diff: float
    weight_diff: float
    loss_tolerance: float
    weight_tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both differences are within tolerance (False for NaN)."""
        return self.loss_diff <= self.loss_tolerance and self.weight_diff <= self.weight_tolerance


def replay(recording: Mapping[str, np.ndarray]) -> Replay:
    """Train on a recorded reference run (keys `argv`, `n_iter`, `init/*`, `batch<i>/*`, `final/*`) and compare."""
    missing = [key for key in ("argv", "n_iter") if key not in recording]
    if missing:
        raise ConfigError(f"not a recorded trajectory: no {', '.join(missing)} in it")
    flags = parse_reference_flags(json.loads(str(recording["argv"])))
    init = _group(recording, "init/")
    num_steps, count = int(recording["n_iter"]), num_features(init)
    lengths = [[_lengths(recording, i, t) for t in range(count)] for i in range(num_steps)]
    hotness = tuple(max(1, *(int(lengths[i][t].max()) for i in range(num_steps))) for t in range(count))
    model, loss, optimizer = reference_configs(flags, init, hotness)
    state = load_reference_state(init, optimizer, flags.qr_operation)
    train_step = jax.jit(make_train_step(model, loss, optimizer), donate_argnums=0)
    loss_diff = 0.0
    with jax.default_matmul_precision("highest"):
        for i in range(num_steps):
            state, metrics = train_step(state, _reference_batch(recording, i, model, lengths[i]))
            loss_diff = _worst(loss_diff, metrics["loss"], recording[f"batch{i}/loss"])
    ours, theirs, weight_diff = save_reference_state(model, state), _group(recording, "final/"), 0.0
    if ours.keys() != theirs.keys():
        raise ConfigError(f"final weights {sorted(ours.keys() ^ theirs.keys())} stand on one side only")
    for name in theirs:
        weight_diff = _worst(weight_diff, ours[name], theirs[name])
    parts = any(feature.parts for feature in model.features)
    return Replay(
        loss_diff,
        weight_diff,
        loss_tolerance=LARGE_LOSS_TOLERANCE if parts else LOSS_TOLERANCE,
        weight_tolerance=WEIGHT_TOLERANCE if optimizer.table == "sgd" else ADAPTIVE_WEIGHT_TOLERANCE,
    )


def _worst(so_far: float, ours: Any, theirs: np.ndarray) -> float:
    # np.maximum, unlike max, keeps a NaN.
    return float(np.maximum(so_far, np.abs(np.asarray(ours, np.float64) - theirs).max()))


def _group(recording: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): recording[name] for name in recording if name.startswith(prefix)}


def _lengths(recording: Mapping[str, np.ndarray], step: int, table: int) -> np.ndarray:
    ends = len(recording[f"batch{step}/indices{table}"])
    return np.diff(recording[f"batch{step}/offsets{table}"], append=ends)


def _reference_batch(
    recording: Mapping[str, np.ndarray], step: int, model: ModelConfig, lengths: list[np.ndarray]
) -> Batch:
    label_B = recording[f"batch{step}/T"][:, 0].astype(np.float32)
    bags = [
        pack_bags(feature.name, recording[f"batch{step}/indices{t}"], lengths[t], feature.hotness)
        for t, feature in enumerate(model.features)
    ]
    return Batch(
        dense_BxN=recording[f"batch{step}/X"].astype(np.float32),
        ids_BxK=np.concatenate(bags, axis=1).astype(np.int32),
        label_B=label_B,
        weight_B=np.ones_like(label_B),
    )
