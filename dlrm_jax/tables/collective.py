"""The collectives of the exchange, for use inside shard_map; over an axis of one device they are nothing."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlrm_jax.host.mesh import DATA, MODEL


@dataclasses.dataclass(frozen=True)
class ExchangeOptions:
    """`dtype` in which vectors travel ("" as they are); rows a device may ask of each peer at once, by stack.

    A stack that `capacity` does not name asks for as many as it has id slots, which is always enough.
    """

    dtype: str = ""
    capacity: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def float_bytes(self) -> int:
        """Bytes of a number that travels between shards."""
        return 2 if self.dtype == "bfloat16" else 4

    def rows_at_once(self, name: str, slots: int) -> int:
        """Rows that a device may ask of each peer at once for `slots` id slots of a stack."""
        return min(self.capacity.get(name, slots), slots)


def to_owners(x_Sx: jax.Array, num_shards: int, dtype: str = "") -> jax.Array:
    """Part s to shard s of `model`; what arrives is by sender. Sent as `dtype` if given, and brought back.

    Two bytes travel as the bits that they are: a CPU's compiler would widen a collective of bfloat16 to float32.
    """
    if num_shards == 1:
        return x_Sx
    sent = x_Sx.astype(dtype or x_Sx.dtype)
    bits = sent.view(jnp.uint16) if sent.dtype.itemsize == 2 else sent
    return jax.lax.all_to_all(bits, MODEL, 0, 0, tiled=True).view(sent.dtype).astype(x_Sx.dtype)


def from_all(x: jax.Array, axis: str, size: int) -> jax.Array:
    """(size * n, ...): every device's (n, ...) along `axis`, in order."""
    return x if size == 1 else jax.lax.all_gather(x, axis, axis=0, tiled=True)


def from_everywhere(x: jax.Array, num_copies: int, num_shards: int) -> jax.Array:
    """As `from_all` over the whole mesh."""
    axes = tuple(axis for axis, size in ((DATA, num_copies), (MODEL, num_shards)) if size > 1)
    return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def from_copies(x: jax.Array, num_copies: int) -> jax.Array:
    """As `from_all` along `data`."""
    return from_all(x, DATA, num_copies)


def sum_over_shards(x: jax.Array, num_shards: int) -> jax.Array:
    """The sum along `model`."""
    return x if num_shards == 1 else jax.lax.psum(x, MODEL)


def shard_index(num_shards: int) -> jax.Array:
    """This device's number along `model`."""
    return jnp.int32(0) if num_shards == 1 else jax.lax.axis_index(MODEL)
