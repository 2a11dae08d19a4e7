"""Large arrays of CPUs go to huge pages: same place, same values; small ones stay as they are."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.host import huge_pages


def bytes_on_huge_pages() -> int:
    found = re.search(r"^AnonHugePages: +(\d+) kB", pathlib.Path("/proc/self/smaps_rollup").read_text(), re.M)
    return int(found[1]) << 10


def test_large_arrays_go_to_huge_pages_and_keep_place_and_values():
    large, small = jax.block_until_ready((jnp.arange(1 << 25, dtype=jnp.int32), jnp.arange(1 << 10)))
    place, before = large.unsafe_buffer_pointer(), bytes_on_huge_pages()

    done = huge_pages.collapse({"large": large, "small": small, "state": ()})

    assert large.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(large, np.arange(1 << 25, dtype=np.int32))
    assert done <= large.nbytes
    if done:  # Else this kernel is before 6.1, or has no huge pages left.
        assert done > large.nbytes - (4 << 20)
        assert bytes_on_huge_pages() - before > done - (8 << 20)


def test_small_arrays_and_other_systems_stay_as_they_are(monkeypatch):
    assert huge_pages.collapse([jnp.ones(1000), np.ones(1 << 25, np.float32), None]) == 0

    monkeypatch.setattr("sys.platform", "darwin")
    assert huge_pages.collapse(jnp.ones(1 << 25)) == 0
