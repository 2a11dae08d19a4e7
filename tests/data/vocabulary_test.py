"""Tests `dlrm_jax/data/values/vocabulary.py` against a dict."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.data.values.vocabulary import Vocabulary


@given(st.lists(st.lists(st.integers(0, 50) | st.integers(0, 2**64 - 1), max_size=30), max_size=20))
@settings(max_examples=200)
def test_equals_a_dict(batches):
    vocabulary, plain = Vocabulary("t"), {}
    for batch in batches:
        before = len(plain)
        expected = [plain.setdefault(key, len(plain)) for key in batch]
        ids, new = vocabulary.encode(np.array(batch, np.uint64))
        assert ids.tolist() == expected
        assert [batch[i] for i in new] == list(plain)[before:]
    assert vocabulary.keys.tolist() == list(plain) and len(vocabulary) == len(plain)


def test_goes_on_from_the_keys_of_another():
    keys = np.random.default_rng(1).permutation(50_000).astype(np.uint64)
    first, other = Vocabulary("t"), Vocabulary("t")
    first.encode(keys)
    other.extend(keys[:20_000])
    other.extend(keys[20_000:])
    np.testing.assert_array_equal(other.keys, first.keys)
    np.testing.assert_array_equal(other.find(keys), np.arange(50_000))
    more = np.array([50_001, 7, 50_001, 60_000], np.uint64)
    assert other.encode(more)[0].tolist() == first.encode(more)[0].tolist()


def test_grows_far_beyond_its_first_size():
    keys = np.random.default_rng(0).integers(0, 2**63, 300_000).astype(np.uint64)
    vocabulary = Vocabulary("t")
    for start in range(0, len(keys), 7_000):
        vocabulary.encode(keys[start : start + 7_000])
    first = np.unique(keys, return_index=True)[1]
    np.testing.assert_array_equal(vocabulary.keys, keys[np.sort(first)])
    np.testing.assert_array_equal(vocabulary.keys[vocabulary.find(keys)], keys)
    assert (vocabulary.find(keys + np.uint64(1)) == -1).mean() > 0.99
    assert vocabulary.num_bytes < 40 * len(vocabulary)


def test_consecutive_keys_do_not_cluster():
    vocabulary = Vocabulary("t")
    ids, _ = vocabulary.encode(np.arange(200_000, dtype=np.uint64))
    np.testing.assert_array_equal(ids, np.arange(200_000))


def test_two_values_of_one_hash_are_refused_not_merged():
    vocabulary = Vocabulary("t", checked=True)
    keys = np.array([5, 6], np.uint64)
    vocabulary.encode(keys, np.array([1, 2], np.uint64))
    vocabulary.encode(keys, np.array([1, 2], np.uint64))
    with pytest.raises(ConfigError, match=r"'t'.*same 64-bit hash"):
        vocabulary.encode(keys, np.array([1, 3], np.uint64))
    with pytest.raises(ConfigError, match="same 64-bit hash"):
        Vocabulary("t", checked=True).encode(np.array([5, 5], np.uint64), np.array([1, 2], np.uint64))


def test_a_slot_newer_than_the_keys_that_a_reader_holds_is_no_hit():
    """As a reader sees it that took the keys before they grew, and the slots after."""
    vocabulary = Vocabulary("t")
    vocabulary.encode(np.array([5, 6], np.uint64))
    vocabulary._keys = np.array([6], np.uint64)
    assert vocabulary.find(np.array([6], np.uint64)).tolist() == [-1]


def test_finding_while_another_thread_adds():
    """A reader sees a key's id or nothing, never another's."""
    keys = np.random.default_rng(1).integers(0, 2**63, 400_000).astype(np.uint64)
    vocabulary, wrong, stop = Vocabulary("t", checked=True), [], threading.Event()
    position = {int(key): i for i, key in enumerate(dict.fromkeys(keys.tolist()))}

    def look() -> None:
        rng = np.random.default_rng(2)
        while not stop.is_set():
            some = keys[rng.integers(0, len(keys), 2_000)]
            found = vocabulary.find(some, some)
            known = found >= 0
            if [position[k] for k in some[known].tolist()] != found[known].tolist():
                wrong.append(1)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for start in range(0, len(keys), 3_000):
        vocabulary.encode(keys[start : start + 3_000], keys[start : start + 3_000])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(vocabulary) == len(position)
