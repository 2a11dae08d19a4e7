"""Compile C++ for this machine, once, and keep the library where only this user may write."""

import hashlib
import importlib.util
import logging
import os
import pathlib
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile

from dlrm_jax.config import ConfigError, how_to_install, require

_LOG = logging.getLogger("dlrm_jax")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OPTIONS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
_INCLUDED = re.compile(r'^#include "([a-z_]+\.h)"', re.MULTILINE)


def built(source: pathlib.Path, options: tuple[str, ...] = ()) -> pathlib.Path:
    """The compiled library: of this source and the headers beside it, these options, this compiler and processor."""
    command = [*compiler(), *_OPTIONS, *options]
    text = source.read_text()
    included = [source.with_name(name).read_text() for name in _INCLUDED.findall(text)]
    told = "\0".join([text, *included, _processor(), *command])
    directory = own_directory()
    name = f"{source.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    for path in directory.glob(f"{name}-*.so"):
        if _is_as_compiled(path):
            return path
        path.unlink(missing_ok=True)
    require(os.access(directory, os.W_OK), f"{directory} may not be written; set XDG_CACHE_HOME to another directory")
    return _compile(command, source, directory, name)


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, g++ or clang++, or the one of the package ziglang."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name.split()
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise ConfigError(
        "no C++ compiler was found, which native kernels need; install g++ or clang++, name one in CXX, "
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


def own_directory() -> pathlib.Path:
    """The cache directory, where nobody else may write: what lies there is loaded into this process, or believed."""
    directory = cache_directory()
    for above in reversed([directory, *directory.parents]):
        above.mkdir(mode=0o700, exist_ok=True)
    facts = directory.stat()
    if facts.st_mode & _OTHERS_WRITE and facts.st_uid == os.geteuid():
        directory.chmod(0o700)
        facts = directory.stat()
    require(
        facts.st_uid in _trusted() and not facts.st_mode & _OTHERS_WRITE,
        f"{directory} is another user's, and compiled code is loaded from there; set XDG_CACHE_HOME to a directory of "
        "your own",
    )
    return directory


def _is_as_compiled(path: pathlib.Path) -> bool:
    """Whether a library is this user's, and the bytes that its name gives the hash of."""
    try:
        facts = path.lstat()
        ours = stat.S_ISREG(facts.st_mode) and facts.st_uid in _trusted() and not facts.st_mode & _OTHERS_WRITE
        return ours and path.stem.endswith(f"-{_hash(path)}")
    except FileNotFoundError:  # Another process found it changed too.
        return False


def _trusted() -> tuple[int, int]:
    """Users whose libraries may be loaded: this one, and the one who can do everything, as in an image's cache."""
    return os.geteuid(), 0


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    keys = ("flags", "Features", "model name")
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in keys)


def _compile(command: list[str], source: pathlib.Path, into: pathlib.Path, name: str) -> pathlib.Path:
    _LOG.info("compiling %s by %s, once: seconds, or minutes by ziglang", source.name, command[0])
    # Beside its place and then moved there, so that no other process meets half a library.
    with tempfile.TemporaryDirectory(dir=into) as directory:
        made = pathlib.Path(directory) / name
        done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
            raise ConfigError(f"{' '.join(command)} could not compile {source.name}: {first}")
        made.chmod(0o700)
        path = into / f"{name}-{_hash(made)}.so"
        os.replace(made, path)
        return path
