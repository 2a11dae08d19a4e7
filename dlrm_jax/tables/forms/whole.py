"""Tables as dense parameters: the gradient of all of their rows, and an update that moves all of them."""

import dataclasses

import jax
import jax.numpy as jnp

from dlrm_jax.tables.forms.base import Learning, States
from dlrm_jax.tables.rows import take_rows
from dlrm_jax.tables.rules import Arrays, Sgd
from dlrm_jax.tables.updates import Stored, Update


def whole_gradient(here: Learning, routes: Arrays, d_pooled_bxfxD: jax.Array) -> jax.Array:
    """(rows, width): the gradient of all of this device's rows, 0 where the batch looked nothing up.

    It is what a table of zeros becomes by SGD with the rate -1, so that every form has it already.
    """
    stack, name = here.stack, here.stack.name
    summing = Update(Sgd(), jnp.float32(-1), jnp.int32(1))
    zeros = {name: jnp.zeros(stack.local_shape, jnp.float32)}
    collecting = dataclasses.replace(here, tables=zeros, states={name: {}}, of_rows=summing, of_weights=summing)
    sums, _ = stack.form.update(collecting, routes, d_pooled_bxfxD)
    return take_rows(sums[name], jnp.arange(stack.rows, dtype=jnp.int32), stack.width)


def update_whole(here: Learning, routes: Arrays, d_pooled_bxfxD: jax.Array) -> tuple[Arrays, States]:
    """The stack's table and slots after an update of all rows, as of a dense parameter."""
    name = here.stack.name
    stored = Stored(here.tables[name], here.states[name])
    stored = here.of_rows.by_all_rows(whole_gradient(here, routes, d_pooled_bxfxD), stored)
    return {name: stored.weights}, {name: stored.slots}
