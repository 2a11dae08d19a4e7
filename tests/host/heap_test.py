"""Freed memory is kept: arrays of megabytes that come and go cost no page faults again."""

import platform
import subprocess
import sys

import pytest

from dlrm_jax.host import heap

FAULTS = """
import resource
from dlrm_jax.host import heap
{first}
def some():
    return [b"x" * ({megabytes} << 20) for _ in range(120 // {megabytes})]
some()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    some()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is told is glibc's")


def faults(first: str, megabytes: int) -> int:
    script = FAULTS.format(first=first, megabytes=megabytes)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)


@on_glibc
@pytest.mark.parametrize(("name", "megabytes"), [("chunks", 3), ("temporaries", 3), ("temporaries", 60)])
def test_arrays_that_come_and_go_fault_once(name, megabytes):
    kept = faults(f"assert heap.keep_freed_{name}()", megabytes)
    assert kept < faults("", megabytes) / 3  # Where pages are of 2 MB, there are few at all.


@on_glibc
def test_what_is_kept_is_counted_and_given_back():
    script = """
from dlrm_jax.host import heap
heap.keep_freed_temporaries()
pieces = [b"x" * (1 << 20) for _ in range(200)]
last = b"x" * (1 << 20)  # Above what is freed, so that it cannot simply be cut off.
before = heap.kept_bytes()
del pieces
assert heap.kept_bytes() - before > 190 << 20
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
held = resident()
heap.give_back()
assert held - resident() > 150 << 20
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_other_systems_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert not heap.keep_freed_chunks() and not heap.keep_freed_temporaries()
