"""What this machine and its devices have left, read from a kernel's files of every kind."""

import resource
import subprocess
import sys
import types

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.host import memory
from tests.helpers import ROOT

GB = 10**9
MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:   8000000 kB\n"


def machine(root, files: dict[str, str]):
    """A kernel's files below `root`."""
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {
    "proc/self/cgroup": "0::/jobs/one\n",
    "sys/fs/cgroup/jobs/one/memory.max": "max\n",
    "sys/fs/cgroup/jobs/memory.max": f"{4 * GB}\n",
    "sys/fs/cgroup/jobs/memory.current": f"{3 * GB}\n",
    "sys/fs/cgroup/jobs/memory.stat": f"anon 5\ninactive_file {GB // 2}\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GB // 4}\n",
}
UNLIMITED = {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 16_384_000_000, 8_192_000_000),
        (UNLIMITED, 16_384_000_000, 8_192_000_000),
        (V2, 4 * GB, 3 * GB // 2),
        (V1, 2 * GB, 5 * GB // 4),
    ],
    ids=["machine", "no limit", "version 2, a group further up", "version 1, in a container"],
)
def test_the_smallest_limit_counts(tmp_path, files, total, available):
    root = machine(tmp_path, files)
    assert memory.host_total(root) == total
    assert memory.host_available(root) == available


def test_without_a_kernel_that_says_nothing_is_refused(tmp_path):
    assert memory.host_available(tmp_path) is None
    memory.require_room("a run", 1e30, None, "memory", "a table", "less", oversubscribe=False)


def test_a_limit_of_this_process_counts():
    script = (
        "import resource\nfrom dlrm_jax.host import memory\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({2 * GB}, resource.RLIM_INFINITY))\n"
        "print(memory.host_available())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * GB
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY or memory.host_available() is not None


def test_devices_say_what_they_have():
    stats = {"bytes_limit": 60 * GB, "bytes_in_use": 20 * GB}
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    silent = types.SimpleNamespace(platform="tpu", memory_stats=lambda: None)
    cpu = types.SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    assert memory.device_available(gpu) == 40 * GB and memory.device_total(gpu, 8) == 60 * GB
    assert memory.device_available(silent) is None and memory.device_total(silent, 8) is None
    assert memory.device_available(cpu) is None
    assert memory.device_total(cpu, 4) == memory.host_total() // 4


def test_what_does_not_fit_is_one_line_and_may_be_tried():
    needs = ("training", 10 * GB, 4 * GB, "memory", "table 'a'", "--embedding_dim=8")
    line = (
        "training needs 10.00 GB of memory, 4.00 GB are free; most of it is table 'a'; what would fit: "
        "--embedding_dim=8; --allow_oversubscription tries all the same"
    )
    with pytest.raises(ConfigError) as error:
        memory.require_room(*needs, oversubscribe=False)
    assert str(error.value) == line
    memory.require_room(*needs, oversubscribe=True)
    memory.require_room("training", 4 * GB, 4 * GB, "memory", "", "", oversubscribe=False)


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 128 bytes."), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("INTERNAL: broken"), False),
        (OSError(2, "No such file"), False),
        (ValueError("RESOURCE_EXHAUSTED"), False),
    ],
)
def test_an_allocation_that_fails_names_the_largest_holder(error, exhausted):
    with pytest.raises(ConfigError if exhausted else type(error)) as raised, memory.named("table 'a'", "fewer rows"):
        raise error
    if exhausted:
        assert "memory ran out (" in str(raised.value)
        assert str(raised.value).endswith("most of it is table 'a'; what would fit: fewer rows")


def test_threads_that_would_not_start_are_one_line():
    """A library that waits for its threads hangs, another aborts: so all are started once, to see whether they do."""
    script = (
        "import resource\nfrom dlrm_jax.host import memory\nmemory.require_threads()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({GB // 2}, resource.RLIM_INFINITY))\n"
        "try:\n    memory.require_threads()\nexcept memory.ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no room for the ") and done.stdout.count("\n") == 1
    assert not done.stderr


SCRIPT = """
import ctypes, threading
from dlrm_jax.host import memory
memory.end_in_one_line()
library = ctypes.CDLL("libstdc++.so.6")
with memory.named("table 'a'", "fewer rows"):
    thread = threading.Thread(target=library["{function}"], args=({argument},))
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C++ library that is told is GNU's")
def test_no_memory_in_a_librarys_thread_is_one_line_and_no_abort():
    def run(function: str, argument: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", SCRIPT.format(function=function, argument=argument)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    for function in ("_ZSt17__throw_bad_allocv", "_ZSt20__throw_system_errori"):  # The latter: no thread could start.
        done = run(function, 11)
        assert done.returncode == 1
        assert done.stderr == "error: memory ran out; most of it is table 'a'; what would fit: fewer rows\n"
    other = run("_ZSt20__throw_length_errorPKc", b"too long")
    assert other.returncode < 0 and "too long" in other.stderr, "whatever else ends a process does so as ever"
