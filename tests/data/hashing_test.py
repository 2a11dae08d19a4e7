"""Tests `dlrm_jax/data/values/hashing.py` against its own text, written out plainly."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data.values.hashing import hash_integers, hash_strings

MASK = 2**64 - 1


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def plain_integer(value: int, seed: int = 0) -> int:
    return mix((value + (seed + 1) * 0x9E3779B97F4A7C15) & MASK)


def plain_string(text: str, seed: int = 0) -> int:
    data = text.encode()
    h = plain_integer(len(data), seed)
    for start in range(0, len(data), 8):
        h = mix(h ^ int.from_bytes(data[start : start + 8].ljust(8, b"\0"), "little"))
    return h


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(0, 3))
def test_integers(values, seed):
    assert hash_integers(np.array(values, np.int64), seed).tolist() == [plain_integer(v, seed) for v in values]


@given(st.lists(st.text(max_size=40), max_size=60), st.integers(0, 3))
@settings(max_examples=200)
def test_strings(texts, seed):
    texts = [text for text in texts if text.isprintable()]
    assert hash_strings(pa.array(texts, pa.string()), seed).tolist() == [plain_string(t, seed) for t in texts]


def test_long_strings_and_slices():
    texts = [f"{i}" * i for i in range(120)] + ["x" * 100_000]
    hashes = hash_strings(pa.array(texts))
    assert hashes.tolist() == [plain_string(text) for text in texts]
    np.testing.assert_array_equal(hash_strings(pa.array(texts).slice(7, 30)), hashes[7:37])


def test_golden():
    """Prepared datasets hold these numbers: a change of the hash is a change of format."""
    assert hash_strings(pa.array(["", "abc", "the quick brown fox"])).tolist() == [
        plain_string(""),
        plain_string("abc"),
        plain_string("the quick brown fox"),
    ]
    assert plain_string("abc") == GOLDEN_ABC


GOLDEN_ABC = 18282511653451584619
