"""What tables are stored as: one object a type, which says what an array of such weights holds and how it is rounded.

Everything else asks the object: rows are read as float32, a step adds to them, and what comes of it is rounded up or
down at random, with the chance that makes the mean exact. docs/ADDING.md says how to add a type.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.host.registry import Registry


@dataclasses.dataclass(frozen=True)
class TableDtype:
    """A type of weights. `stored` is NumPy's name of what the array holds, 0 in it a weight of 0. Here float32."""

    stored: ClassVar[str] = "float32"

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded: updates add in place, without random bits."""
        return self.stored == "float32"

    @property
    def bytes(self) -> int:
        """Bytes of a weight."""
        return np.dtype(self.stored).itemsize

    def to_floats(self, stored: Any) -> Any:
        """Stored weights as float32, of any shape, NumPy's or JAX's."""
        return stored

    def from_floats(self, rows: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """float32 weights as they are stored: the nearest, or, given 32 random bits each, one of the two neighbours."""
        del noise
        return rows

    def numbers(self, stored: Any) -> Any:
        """Stored weights as whoever reads a table by its name has them: here float32."""
        return self.to_floats(stored)


DTYPES: Registry[type[TableDtype]] = Registry(
    "table_dtype",
    "dlrm_jax.table_dtypes",
    lambda kind: isinstance(kind, type) and issubclass(kind, TableDtype),
    "class of TableDtype",
)
register = DTYPES.register


def table_dtype(name: str) -> TableDtype:
    """The type called `name`; ConfigError naming what there is."""
    return DTYPES.get(name)()


FLOAT32 = register("float32")(TableDtype)()


class _Half(TableDtype):
    number: ClassVar[Any]

    def to_floats(self, stored: Any) -> Any:
        return self.numbers(stored).astype(jnp.float32)

    def from_floats(self, rows: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        numbers = rows.astype(self.number) if noise is None else rounded(rows, self.number, noise)
        return numbers.view(self.stored)

    def numbers(self, stored: Any) -> Any:
        return stored.view(self.number)


@register("bfloat16")
class BFloat16(_Half):
    """float32's range in two bytes, stored as bits: a CPU's compiler would widen a whole table to scatter into it."""

    stored, number = "uint16", jnp.bfloat16


@register("float16")
class Float16(_Half):
    """Two bytes, of which 11 bits count, up to 65504."""

    stored, number = "float16", jnp.float16


def rounded(rows_Mxw: jax.Array, dtype: Any, noise_Mxw: jax.Array) -> jax.Array:
    """float32 rows as bfloat16 or float16, up or down with the chance that makes the mean exact.

    `noise_Mxw` are 32 random bits each. Added below the last bit that is kept, they carry into it as often as the part
    that is cut off says: 1.25 between 1 and 1.5 becomes 1.5 in half of all cases. What is beyond the type's range is
    rounded to the nearest.
    """
    cut = 16 if dtype == jnp.bfloat16 else 13
    bits = jax.lax.bitcast_convert_type(rows_Mxw, jnp.uint32) + (noise_Mxw >> jnp.uint32(32 - cut))
    near = jax.lax.bitcast_convert_type(bits >> jnp.uint32(cut) << jnp.uint32(cut), jnp.float32)
    # Below float16's smallest normal number fewer bits are kept: there the noise is one of that number's last place.
    least = float(jnp.finfo(dtype).tiny)
    place = float(jnp.finfo(dtype).smallest_subnormal)
    unit = noise_Mxw.astype(jnp.float32) * jnp.float32(2**-32)
    below = jnp.floor(rows_Mxw / place + unit) * place
    usual = jnp.isfinite(rows_Mxw) & (jnp.abs(near) <= float(jnp.finfo(dtype).max))
    small = (jnp.abs(rows_Mxw) < least) & (dtype == jnp.float16)
    return jnp.where(small, below, jnp.where(usual, near, rows_Mxw)).astype(dtype)
