"""Numbers that look random and follow from what they are for: initial weights, and which way a weight is rounded."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import TableConfig


def mix(x: jax.Array) -> jax.Array:
    """The 32-bit finalizer of MurmurHash3: every input bit flips every output bit with probability one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def table_keys(tables: tuple[TableConfig, ...], seed: int) -> np.ndarray:
    """(T, 2) uint32: what stands for (seed, table name)."""
    digests = [hashlib.blake2b(f"{seed}/{table.name}".encode(), digest_size=8).digest() for table in tables]
    return np.array([np.frombuffer(digest, np.uint32) for digest in digests])
