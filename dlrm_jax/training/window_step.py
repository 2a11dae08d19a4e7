"""Steps that cut their batch from a window, and leave their metrics on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dlrm_jax.tables.exchange import OVERFLOWS
from dlrm_jax.training.feed import Feed, Window
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import TrainStep

RECORDED = ("loss", "learning_rate", "finite", OVERFLOWS)
"""What a window's record holds of each step, float32; NaN where a step has no such metric."""

WindowStep = Callable[[TrainState, jax.Array, Window], tuple[TrainState, jax.Array]]


def make_window_step(step: TrainStep, feed: Feed, count: int = 1) -> WindowStep:
    """`(state, record_TxM, window) -> (state, record)`: `count` steps, one after the other, by `feed`'s window.

    A step's metrics go into the record's row of that step, and stay on the device until somebody asks. Several steps
    are one dispatch instead of many, for where launching a step takes as long as the step; equal up to rounding.
    """

    def one(state: TrainState, record_TxM: jax.Array, window: Window) -> tuple[TrainState, jax.Array]:
        new_state, step_metrics = step(state, feed.batch(window, state.step))
        return new_state, _noted(feed, window, state.step, record_TxM, step_metrics)

    def several(state: TrainState, record_TxM: jax.Array, window: Window) -> tuple[TrainState, jax.Array]:
        def next_step(_: jax.Array, carried: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
            return one(*carried, window)

        return jax.lax.fori_loop(0, count, next_step, (state, record_TxM))

    return one if count == 1 else several


def _noted(
    feed: Feed, window: Window, step: jax.Array, record_TxM: jax.Array, step_metrics: dict[str, jax.Array]
) -> jax.Array:
    """The record with a step's metrics."""
    nothing = jnp.full((), jnp.nan)
    values = jnp.stack([step_metrics.get(name, nothing).astype(jnp.float32) for name in RECORDED])
    return record_TxM.at[(step - window.first_step) % feed.cut.steps].set(values)


def make_pipelined_window_step(step: Callable[..., Any], feed: Feed) -> Callable[..., Any]:
    """`(state, record, window, routes, next window) -> (state, record, next routes)` of step.make_pipelined_step.

    The next window is the same but where the window ends with this step.
    """

    def train_step(
        state: TrainState, record_TxM: jax.Array, window: Window, routes: Any, next_window: Window
    ) -> tuple[TrainState, jax.Array, Any]:
        batch, next_batch = feed.batch(window, state.step), feed.batch(next_window, state.step + 1)
        new_state, step_metrics, next_routes = step(state, batch, routes, next_batch)
        return new_state, _noted(feed, window, state.step, record_TxM, step_metrics), next_routes

    return train_step
