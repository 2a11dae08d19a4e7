"""Compile C++ for this machine, once; give the functions of tables.cc to XLA."""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import jax

from dlrm_jax.config import ConfigError, how_to_install

TABLES, SCORE, _INCLUDED = map(pathlib.Path(__file__).with_name, ("tables.cc", "score.cc", "parallel.h"))
TARGETS = ("dlrm_lookup", "dlrm_update_sgd", "dlrm_update_adagrad", "dlrm_update_rowwise_adagrad")
_LOG = logging.getLogger("dlrm_jax")
_OPTIONS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")


@functools.cache
def register() -> None:
    """Make TARGETS known to XLA on CPUs; compiles them first where no earlier run did.

    Raises ConfigError without a C++ compiler, or where it fails.
    """
    library = ctypes.CDLL(str(built(TABLES, ("-isystem", jax.ffi.include_dir()))))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")


def built(source: pathlib.Path, options: tuple[str, ...]) -> pathlib.Path:
    """The compiled library: of this source, these options, this jaxlib, this compiler and this kind of processor."""
    command = [*compiler(), *_OPTIONS, *options]
    told = "\0".join([source.read_text(), _INCLUDED.read_text(), jax.lib.__version__, _processor(), *command])
    path = cache_directory() / f"{source.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _compile(command, source, path)
    return path


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, g++ or clang++, or the one of the package ziglang."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name.split()
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise ConfigError(
        "no C++ compiler was found for --cpu_kernels=native; install g++ or clang++, name one in CXX, "
        f"or {how_to_install('native')}"
    )


def has_compiler() -> bool:
    """Whether `compiler` finds one."""
    try:
        return bool(compiler())
    except ConfigError:
        return False


def cache_directory() -> pathlib.Path:
    """Where compiled libraries are kept: $XDG_CACHE_HOME/dlrm_jax, by default ~/.cache/dlrm_jax."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dlrm_jax"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    keys = ("flags", "Features", "model name")
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in keys)


def _compile(command: list[str], source: pathlib.Path, path: pathlib.Path) -> None:
    _LOG.info("compiling %s by %s, once: seconds, or minutes by ziglang", source.name, command[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and then moved there, so that no other process meets half a library.
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = pathlib.Path(directory) / path.name
        done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
            raise ConfigError(f"{' '.join(command)} could not compile {source.name}: {first}")
        os.replace(made, path)
