"""What a Pallas program on a GPU works on at a time: some rows side by side, each as wide as a power of two.

One program is one warp. Triton asks for powers of two, so that rows of other widths have lanes which nothing is read
into or written from.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

FLOATS = 256
"""Of a block: 8 in each of a warp's threads."""

IN_FLIGHT = 4
"""Blocks that a program reads at once; a GPU waits for memory less, the more reads are under way."""

ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def warp() -> triton.CompilerParams:
    """How Triton is to compile a program."""
    return triton.CompilerParams(num_warps=1, num_stages=1)


@dataclasses.dataclass(frozen=True)
class Block:
    """R rows of `width` floats, in W lanes each."""

    width: int

    @property
    def lanes(self) -> int:
        """W."""
        return pl.next_power_of_2(self.width)

    @property
    def rows(self) -> int:
        """R."""
        return max(1, FLOATS // self.lanes)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, W)."""
        return self.rows, self.lanes

    def numbers(self) -> jax.Array:
        """(R,): which of all rows this program's are."""
        return pl.program_id(0) * self.rows + jnp.arange(self.rows, dtype=jnp.int32)

    def spread(self, of_rows_R: jax.Array) -> jax.Array:
        """(R, W): one number a row, for each of its lanes."""
        return jnp.broadcast_to(of_rows_R[:, None], self.shape)

    def columns(self) -> jax.Array:
        """(R, W): each lane's column."""
        return jnp.broadcast_to(jnp.arange(self.lanes, dtype=jnp.int32)[None], self.shape)

    def inside(self, rows_R: jax.Array) -> jax.Array:
        """(R, W): the lanes that are columns, of rows that count."""
        return self.spread(rows_R) & (self.columns() < self.width)

    def load(self, ref: Any, at_R: jax.Array, where_R: jax.Array) -> jax.Array:
        """The rows `at_R` of an array, 0 for those that do not count: (R, W), or (R, 1) where it has one column."""
        place, mask = self._place(ref, at_R, where_R)
        return triton.load(ref.at[place], mask=mask, other=jnp.zeros((), ref.dtype))

    def store(self, ref: Any, at_R: jax.Array, values: jax.Array, where_R: jax.Array) -> None:
        """Write them."""
        place, mask = self._place(ref, at_R, where_R)
        triton.store(ref.at[place], values.astype(ref.dtype), mask=mask)

    def _place(self, ref: Any, at_R: jax.Array, where_R: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        if ref.shape[1] == 1 and self.width > 1:
            return (at_R[:, None], jnp.zeros((self.rows, 1), jnp.int32)), where_R[:, None]
        return (self.spread(at_R), self.columns()), self.inside(where_R)
