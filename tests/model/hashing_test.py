"""Tests `dlrm_jax/model/hashing.py`: bits that follow from key and place alone, and look like draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.model.hashing import many_bits


def plain_mix(x: int) -> int:
    """The finalizer of MurmurHash3, as its author writes it."""
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def bits_of(seed: int, rows: int, columns: int) -> np.ndarray:
    """As dropout draws them: a key for each row."""
    row_R = jnp.arange(rows)
    draw = lambda row: jax.random.bits(many_bits(jax.random.fold_in(jax.random.key(seed), row)), (columns,))  # noqa: E731
    return np.asarray(jax.vmap(draw)(row_R))


def test_bits_are_hashes_of_the_place_and_both_words_of_the_key():
    first, second = (int(word) for word in jax.random.key_data(jax.random.fold_in(jax.random.key(3), 7)))
    places = range(20)
    want = [plain_mix(plain_mix(i * 0x9E3779B9 & 0xFFFFFFFF ^ first) + second & 0xFFFFFFFF) for i in places]
    assert bits_of(3, 8, 20)[7].tolist() == want


def test_every_bit_is_a_fair_coin_that_knows_nothing_of_its_neighbours():
    found = np.unpackbits(bits_of(0, 256, 256).astype("<u4").view(np.uint8).reshape(256, 256, 4), axis=2)
    coins = 2.0 * found - 1
    error = 5 / 256  # Five deviations of a mean of 256 * 256 fair coins.
    assert np.abs(coins.mean(axis=(0, 1))).max() < error
    for other in (np.roll(coins, 1, axis=0), np.roll(coins, 1, axis=1), np.roll(coins, 1, axis=2)):
        assert np.abs((coins * other).mean(axis=(0, 1))).max() < error
    other = np.unpackbits(bits_of(1, 256, 256).astype("<u4").view(np.uint8).reshape(256, 256, 4), axis=2)
    assert np.abs((coins * (2.0 * other - 1)).mean(axis=(0, 1))).max() < error


def test_what_it_does_not_give_is_refused():
    with pytest.raises(ValueError, match="8 bits for each"):
        jax.random.bits(many_bits(jax.random.key(0)), (3,), "uint8")
