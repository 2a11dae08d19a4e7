"""Learning rate as a function of the step: linear warm-up, a constant rate, decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.config import ScheduleConfig

Schedule = Callable[[jax.Array | int], jax.Array]

_DLRM_FLOOR = 1e-7
"""The reference never decays below this (lr_policy_scheduler in dlrm_s_pytorch.py)."""


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The learning rate of the update number `step`, counted from 0.

    With t = step + 1, W warm-up steps, decay from S over D steps:
    t < W: base t / W; then base; from S on, over D steps, down to the end rate, which follows: polynomially, base
    ((S + D - t) / D)^power but at least the end rate; or by optax, linearly or as half a cosine.
    With `compat="dlrm"` the reference's LRPolicyScheduler: when D > 0 the rate freezes at its last warm-up value
    between W and S, power is 2, the floor 1e-7, and after the decay it stays at its last decayed value.
    """
    base, warmup, start, steps = config.learning_rate, config.warmup_steps, config.decay_start_step, config.decay_steps
    reference = config.compat == "dlrm" and steps > 0
    power = 2.0 if reference else config.decay_power
    floor = _DLRM_FLOOR if reference else config.end_learning_rate
    plateau = base * (warmup - 1) / warmup if reference and warmup > 1 else base
    last = max(floor, base / steps**power) if reference else floor

    def polynomial(t: jax.Array) -> jax.Array:
        return jnp.maximum(floor, base * jnp.clip((steps - t) / steps, 0, 1) ** power)

    decayed: Callable[[Any], Any] = polynomial
    if not reference and steps > 0 and config.decay == "linear":
        decayed = optax.linear_schedule(base, floor, steps)
    if not reference and steps > 0 and config.decay == "cosine":
        decayed = optax.cosine_decay_schedule(base, steps, alpha=floor / base)

    def schedule(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step, jnp.float32) + 1
        rate = jnp.where(t < warmup, base * t / max(warmup, 1), plateau)
        if steps > 0:
            rate = jnp.where(t >= start, decayed(t - start), rate)
            rate = jnp.where(t >= start + steps, last, rate)
        return rate.astype(jnp.float32)

    return schedule
