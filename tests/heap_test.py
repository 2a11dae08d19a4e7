"""Freed memory is kept: arrays of megabytes that come and go cost no page faults again."""

import platform
import subprocess
import sys

import pytest

from dlrm_jax.data.heap import keep_freed_memory

FAULTS = """
import resource, numpy as np
from dlrm_jax.data.heap import keep_freed_memory
{first}
def some():
    return [np.ones(3 << 20, np.uint8) for _ in range(40)]
some()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    some()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first: str) -> int:
    script = FAULTS.format(first=first)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is told is glibc's")
def test_arrays_that_come_and_go_fault_once():
    assert faults("assert keep_freed_memory()") < faults("") / 3  # Where pages are of 2 MB, there are few at all.


def test_other_systems_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_freed_memory()
