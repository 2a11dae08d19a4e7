"""Adagrad's sums made smaller between periods, so that a model that has seen much still moves with what is new."""

import functools
from collections.abc import Callable

import jax

from dlrm_jax.config import require
from dlrm_jax.tables.exchange import stack_rule
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import TrainState


def make_decay(placed: Placed, factor: float) -> Callable[[TrainState], TrainState]:
    """What multiplies every sum of squares of a state, tables' and dense parameters', with `factor`, in place.

    ConfigError where no optimizer keeps such sums: moments that decay by themselves need nothing.
    """
    sums = {stack.name: stack_rule(placed.optimizer, stack).kind.sums for stack in placed.stacks}
    of_dense = placed.optimizer.dense == "adagrad"
    require(
        of_dense or any(sums.values()),
        f"--decay_sums={factor:g} has no effect: neither tables nor dense parameters have Adagrad; leave it out",
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=placed.shardings)
    def decay(state: TrainState) -> TrainState:
        slots = {
            name: {slot: factor * kept if slot in sums.get(_stack(name), ()) else kept for slot, kept in own.items()}
            for name, own in state.table_opt_state.items()
        }
        dense = state.dense_opt_state
        if of_dense:
            dense = jax.tree.map(lambda kept: factor * kept, dense)
        return state.replace(table_opt_state=slots, dense_opt_state=dense)

    return decay


def _stack(name: str) -> str:
    """The stack of an array of weights, or of its learned pooling weights."""
    return name.removesuffix(POOLING_WEIGHTS)
