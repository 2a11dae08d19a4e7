"""New rows of arrays on devices, set in place: of a table of any size only these are copied."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_LEAST_ROWS = 255
"""There is room for more rows than these."""

Take = Callable[[jax.Array, jax.Array], jax.Array]
"""(array, row_M) -> the rows there."""


@jax.jit
def _take(array: jax.Array, row_M: jax.Array) -> jax.Array:
    return array.at[row_M].get(mode="clip")


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, row_M: jax.Array, rows_MxD: jax.Array) -> jax.Array:
    return array.at[row_M].set(rows_MxD, mode="drop")


class Scatter:
    """Rows of an array, and those that were there: both on its devices, and the program compiled, before any is set.

    Their number is rounded up, so that a few programs do for all deltas; rows of padding are outside of the array.
    """

    def __init__(
        self,
        array: jax.Array,
        row_M: np.ndarray,
        rows_MxD: np.ndarray,
        take: Take = _take,
        put: Any = _put,
        where: Any = None,
    ) -> None:
        """`take` and `put`, jitted, are for arrays that lie on several devices; `where` is what these have whole."""
        size = 1 << max(_LEAST_ROWS, len(row_M) - 1).bit_length()
        more = size - len(row_M)
        self._row_M = jax.device_put(np.pad(row_M.astype(np.int32), (0, more), constant_values=array.shape[0]), where)
        self._new = jax.device_put(np.pad(rows_MxD, ((0, more), (0, 0))), where)
        self._old = jax.block_until_ready(jax.device_put(take(array, self._row_M), where))
        self._put = _compiled(put, *map(_described, (array, self._row_M, self._new)))

    def __call__(self, array: jax.Array, undone: bool) -> jax.Array:
        """The array with the new rows, or those that were there; it is given away."""
        changed: jax.Array = self._put(array, self._row_M, self._old if undone else self._new)
        return changed


@functools.lru_cache(maxsize=64)
def _compiled(put: Any, *described: jax.ShapeDtypeStruct) -> Any:
    return put.lower(*described).compile()


def _described(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
