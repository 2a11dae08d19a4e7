"""The rows of a state's tables where they lie, read from its devices without a copy of a table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.grown import WEIGHTS
from dlrm_jax.tables.reshard import Source
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import TrainState


def live_rows(placed: Placed, state: TrainState) -> Source:
    """Rows of the weights of a state; it must not be given away meanwhile."""
    arrays = {WEIGHTS: state.tables}
    return Source(placed.stacks, lambda group, name: _OnDevices(arrays[group][name]))


class _OnDevices:
    """An array that is indexed by rows as NumPy's are; what is asked for comes to the host."""

    def __init__(self, array: jax.Array) -> None:
        self._array, self.shape = array, array.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.shape[0]))
        # A few sizes, so that a few programs do for all.
        size = 1 << max(len(rows) - 1, 0).bit_length()
        row_M = np.pad(rows.astype(np.int32), (0, size - len(rows)))
        return np.asarray(_taken(self._array, row_M))[: len(rows)]


@jax.jit
def _taken(array: jax.Array, row_M: jax.Array) -> jax.Array:
    return array.at[jnp.asarray(row_M)].get(mode="clip")
