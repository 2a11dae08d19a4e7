"""Hashes of numbers instead of draws: the random bits of dropout; what initial weights and roundings follow from."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry_prng_impl

_GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio, odd: its multiples, modulo 2^32, are all different and far from each other."""


def mix(x: Any) -> Any:
    """The 32-bit finalizer of MurmurHash3: every input bit flips every output bit with probability one half.

    Of uint32, in arrays of NumPy or JAX.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _random_bits(key_2: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Of each place in `shape`, at most 2^32 of them, a hash of its number and both words of the key."""
    if bit_width == 64:  # As in float64.
        halves = [_random_bits(key, 32, shape).astype(jnp.uint64) for key in (key_2, key_2[::-1])]
        return halves[0] << 32 | halves[1]
    if bit_width != 32 or math.prod(shape) >= 2**32:
        raise ValueError(f"{bit_width} bits for each of {shape}; it must be 32 or 64, for less than 2^32 places")
    place = jax.lax.iota(np.uint32, math.prod(shape)).reshape(shape)
    return mix(mix(place * jnp.uint32(_GOLDEN) ^ key_2[0]) + key_2[1])


_COUNTER_HASH = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape,
    seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split,
    fold_in=threefry_prng_impl.fold_in,
    random_bits=_random_bits,
    name="counter_hash",
    tag="hash",
)


def many_bits(key: jax.Array) -> jax.Array:
    """The key of JAX's default kind, but its bits are hashes of their place: a sixth of the work where they are many.

    Keys are still split and folded by Threefry, so that no two say the same.
    """
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_COUNTER_HASH)
