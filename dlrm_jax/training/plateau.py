"""Cuts of the learning rate where validation stalls (config/learning.py Plateau).

A cut is a factor in the state, which every step multiplies its rate with, so that a checkpoint has it. With patience 0
and factor 0.1, val AUC .70 .74 .74 .75 .75 by evaluation makes the factor 1 1 .1 .1 .01 behind each.
"""

import dataclasses
import logging
import math

import jax
import numpy as np

from dlrm_jax.config.learning import ScheduleConfig, parse_plateau
from dlrm_jax.training.state import TrainState

_LOG = logging.getLogger("dlrm_jax")


@dataclasses.dataclass
class Stall:
    """What cuts depend on: the best value of the evaluations so far, and how many came since without such a gain."""

    best: float | None = None
    evaluations: int = 0


def cut_where_stalled(
    config: ScheduleConfig, stall: Stall, value: float, smaller_is_better: bool, state: TrainState
) -> TrainState:
    """The state behind an evaluation that gave `value`, its rate cut if that was one too many; `stall` is renewed."""
    plateau = parse_plateau(config.plateau)
    if plateau is None or state.rate_factor is None:
        return state
    gain = math.inf if stall.best is None else (stall.best - value if smaller_is_better else value - stall.best)
    if gain > plateau.min_delta:  # A NaN is no gain.
        stall.best, stall.evaluations = value, 0
        return state
    stall.evaluations += 1
    if stall.evaluations <= plateau.patience:
        return state
    stall.evaluations = 0
    before, least = float(state.rate_factor), plateau.min / config.learning_rate
    factor = max(before * plateau.factor, min(least, before))
    if factor == before:
        return state
    _LOG.info("no better evaluation: the learning rate is now %g times the schedule's", factor)
    return state.replace(rate_factor=jax.device_put(np.float32(factor), state.rate_factor.sharding))
