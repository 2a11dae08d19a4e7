"""Embedding rows in few bits: each row has codes of its own scale and bias, so that one row is dequantised at a time.

A packed row is its D codes (two to a byte if they have 4 bits, the first one low), then scale and bias:
value = code * scale + bias. Headers:

    float32, float16   the reference's 8 and 4 bits (FBGEMM's FusedNBitRowwise), equal to the bit
    bfloat16           ours, and what export writes: 4 bytes a row instead of 8, and float32's range. At D=16 the
                       reference's 8-bit rows are 0.375 of float32's size, these 0.3125

The bias of ours is rounded down and the scale up, so that every value lies between the first and the last code, and is
off by at most half a scale.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.serving.artifact import signature
from dlrm_jax.tables.pooling import read_rows

TABLE_TYPES = signature.TABLE_TYPES
BITS = {"int8": 8, "int4": 4}
HEADERS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def stored_table(rows_RxD: np.ndarray, kind: str) -> np.ndarray:
    """A float32 table as an export stores it: float32, bfloat16, or packed uint8 rows."""
    if kind not in BITS:
        return rows_RxD.astype(HEADERS[kind], copy=False)
    return quantise_rows(rows_RxD, BITS[kind])


def take_stored(kind: str, embedding_dim: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """How embedding.lookup reads float32 rows of a stack stored so; only what is looked up is dequantised."""
    if kind == "float32":
        return read_rows
    if kind == "bfloat16":
        return lambda table, row_ids: read_rows(table, row_ids).astype(jnp.float32)
    return lambda table, row_ids: dequantise_rows(read_rows(table, row_ids), BITS[kind], embedding_dim)


def quantise_rows(rows_RxD: np.ndarray, bits: int, header: str = "bfloat16") -> np.ndarray:
    """(R, bytes of a row) uint8. Raises ConfigError for values that are not finite."""
    if not np.isfinite(rows_RxD).all():
        raise ConfigError(f"row {int(np.flatnonzero(~np.isfinite(rows_RxD).all(axis=1))[0])} holds NaN or infinity")
    last = np.float32(2**bits - 1)
    least_Rx1 = rows_RxD.min(axis=1, keepdims=True)
    if header == "float32":
        scale_Rx1, bias_Rx1 = (rows_RxD.max(axis=1, keepdims=True) - least_Rx1) / last, least_Rx1
        inverse_Rx1 = last / (scale_Rx1 * last + np.float32(1e-8))
    else:
        bias_Rx1 = _rounded(least_Rx1, header, up=False)
        scale_Rx1 = _rounded((rows_RxD.max(axis=1, keepdims=True) - bias_Rx1) / last, header, up=True)
        scale_Rx1 = np.where(scale_Rx1 == 0, np.float32(1), scale_Rx1)
        inverse_Rx1 = 1 / scale_Rx1
    codes_RxD = np.clip(np.rint((rows_RxD - bias_Rx1) * inverse_Rx1), 0, last).astype(np.uint8)
    headers = np.concatenate([scale_Rx1, bias_Rx1], axis=1).astype(HEADERS[header])
    return np.concatenate([_pack(codes_RxD, bits), np.ascontiguousarray(headers).view(np.uint8)], axis=1)


def _rounded(values: np.ndarray, header: str, up: bool) -> np.ndarray:
    """float32 values that the header's type holds: the nearest, or of bfloat16 the next in one direction."""
    nearest = values.astype(HEADERS[header])
    if header == "bfloat16":
        beyond = nearest.astype(np.float32) < values if up else nearest.astype(np.float32) > values
        # nextafter of ml_dtypes moves by one unit in the last place.
        away = np.full_like(nearest, np.inf if up else -np.inf)
        nearest = np.where(beyond, np.nextafter(nearest, away), nearest)
    return nearest.astype(np.float32)


def _pack(codes_RxD: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes_RxD
    if codes_RxD.shape[1] % 2:
        codes_RxD = np.pad(codes_RxD, ((0, 0), (0, 1)))
    return codes_RxD[:, 0::2] | (codes_RxD[:, 1::2] << 4)


def dequantise_rows(packed: jax.Array, bits: int, embedding_dim: int, header: str = "bfloat16") -> jax.Array:
    """float32 values (..., D) of packed rows (..., bytes)."""
    num_bytes = -(-embedding_dim * bits // 8)
    codes = packed[..., :num_bytes]
    if bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)[..., :embedding_dim]
    scale, bias = jnp.split(_headers(packed[..., num_bytes:], header), 2, axis=-1)
    return codes.astype(jnp.float32) * scale + bias


def _headers(stored: jax.Array, header: str) -> jax.Array:
    """float32 numbers (..., 2) of their bytes, the lowest first."""
    dtype = HEADERS[header]
    # bfloat16 is the upper half of a float32. Bytes are put together by shifts, since jax.export cannot refine a
    # bitcast of bytes under a symbolic batch size.
    word = jnp.uint16 if header == "float16" else jnp.uint32
    first = 16 if header == "bfloat16" else 0
    size = dtype.itemsize
    words = [
        sum((stored[..., i * size + j].astype(word) << word(first + 8 * j) for j in range(size)), start=word(0))
        for i in range(2)
    ]
    kind = jnp.float16 if header == "float16" else jnp.float32
    return jax.lax.bitcast_convert_type(jnp.stack(words, axis=-1), kind).astype(jnp.float32)
