"""Eight CPU devices, no silent broadcasting between ranks, the same examples from hypothesis in every run.

Compiling is most of what the tests do. What one test compiled is there for the others, in other processes too; and what
runs a few times is hardly optimised, where a test does not ask for it (`optimised`).
JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles all as users do.
"""

import atexit
import collections
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # Workers and the commands that tests start inherit it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # Workers and the commands that tests start inherit it too.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # Half the time; a newer XLA does not know the name.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

_NOT_FUSED = "--xla_cpu_use_fusion_emitters=false"

# `HYPOTHESIS_PROFILE=explore python -m pytest tests/data/fuzz_test.py` looks for new failures; each becomes a test.
hypothesis.settings.register_profile("repeat", derandomize=True)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a test that is marked `sample(n)`, all cases but n, evenly spaced, are exhaustive.

    What is exhaustive runs with `-m ''`, or where -m names it: `-m slow` is of what runs by default.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("exhaustive"):
            cases[item.path, item.originalname].append(item)
    for of_one in cases.values():
        count = min(of_one[0].get_closest_marker("sample").args[0], len(of_one))
        kept = {i * (len(of_one) - 1) // max(1, count - 1) for i in range(count)}
        for i, item in enumerate(of_one):
            if i not in kept:
                item.add_marker(pytest.mark.exhaustive)
    if config.option.markexpr and "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture
def compiled_anew(monkeypatch):
    """Processes that the test starts compile for themselves: equal bits are then no copy's."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")


@pytest.fixture(scope="module")
def optimised():
    """Processes that the tests of a file start compile as a user's do: for what trains or serves for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        _fuse(patch)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that is marked `fused` runs in a process of its own, with XLA's fusion emitters."""
    if not pyfuncitem.get_closest_marker("fused") or _NOT_FUSED not in os.environ.get("XLA_FLAGS", ""):
        return None
    with pytest.MonkeyPatch.context() as patch:
        _fuse(patch)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", pyfuncitem.nodeid]
        finished = subprocess.run(command, cwd=pyfuncitem.config.rootpath, capture_output=True, text=True)
    assert finished.returncode == 0 and "1 passed" in finished.stdout, finished.stdout + finished.stderr
    return True


def _fuse(patch):
    """Compile with XLA's fusion emitters. XLA_FLAGS of blanks is read as the name of a file."""
    rest = os.environ.get("XLA_FLAGS", "").replace(_NOT_FUSED, "").strip()
    patch.setenv("XLA_FLAGS", rest) if rest else patch.delenv("XLA_FLAGS", raising=False)
