"""What hashes of a table's rows begin with: initial weights, and which way a weight is rounded."""

import hashlib

import numpy as np

from dlrm_jax.config import TableConfig


def table_keys(tables: tuple[TableConfig, ...], seed: int) -> np.ndarray:
    """(T, 2) uint32: what stands for (seed, table name)."""
    digests = [hashlib.blake2b(f"{seed}/{table.name}".encode(), digest_size=8).digest() for table in tables]
    return np.array([np.frombuffer(digest, np.uint32) for digest in digests])
