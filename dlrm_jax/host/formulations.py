"""Where backends want the same meaning computed differently, the choice, by name; tests hold both sides equal.

The choice is made when a function is lowered, by the platform it is lowered for: a step compiled for a TPU on a machine
without one is the TPU's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

AUTO, XLA, PALLAS, NATIVE = KERNELS = ("auto", "xla", "pallas", "native")
"""Who looks up and updates tables: XLA, Pallas on GPUs, C++ on a CPU, compiled at the first use; auto chooses."""


def by_platform(cpu: Callable[..., Any], others: Callable[..., Any], *args: Any) -> Any:
    """`cpu(*args)` on CPUs, `others(*args)` elsewhere."""
    return jax.lax.platform_dependent(*args, cpu=cpu, default=others)


def sort_ids(ids_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(ids that are not negative in order, the slots they came from); equal ids stay in slot order."""
    return by_platform(sort_packed, sort_pairs, ids_M)


def sort_pairs(ids_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sort_ids` as a sort of pairs, which GPUs and TPUs have."""
    return jax.lax.sort_key_val(ids_M, jnp.arange(ids_M.shape[0], dtype=jnp.int32))


def sort_packed(ids_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sort_ids` as a sort of 64-bit numbers, id above slot: XLA's CPU sort of pairs calls a function a comparison."""
    with jax.enable_x64(True):
        slots_M = jnp.arange(ids_M.shape[0], dtype=jnp.int64)
        sorted_M = jax.lax.sort((ids_M.astype(jnp.int64) << jnp.int64(32)) | slots_M)
        return (sorted_M >> jnp.int64(32)).astype(jnp.int32), sorted_M.astype(jnp.int32)
