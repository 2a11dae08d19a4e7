"""Directories where one command at a time writes, files that are whole or absent, outputs checked before the work."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Iterator

from dlrm_jax.config import ConfigError, require

LOCK = ".lock"
"""The file in a directory whose lock is held by who writes there."""

_LOG = logging.getLogger("dlrm_jax")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""What a file system without locks answers, as some NFS mounts."""

_LOCK_SECONDS = 1.0
"""A reader that looks whether somebody writes holds the lock for a moment."""


@contextlib.contextmanager
def alone(path: pathlib.Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; ConfigError if another process holds it. The lock goes with the process.

    `what` says what the other one is, as "another training is running in DIR".
    """
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            if _lock(file.fileno(), _LOCK_SECONDS) is False:
                file.seek(0)
                who = file.read().strip()
                raise ConfigError(f"{what}{f' ({who})' if who else ''}; wait for its end, or stop it")
            if _is_still(path, file.fileno()):
                break  # Else who held it has deleted it meanwhile, and others lock a new one.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _is_still(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_held(path: pathlib.Path) -> bool:
    """Whether another process holds the lock file `path`, which is only read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(descriptor, kind=fcntl.LOCK_SH) is False
    finally:
        os.close(descriptor)


def _lock(descriptor: int, seconds: float = 0.0, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Whether the lock was taken; None where the file system has no locks, which is said."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning("this file system has no locks (%s): let only one command write here", error.strerror)
            return None


def try_lock_directory(directory: pathlib.Path) -> int | None:
    """A descriptor whose closing ends the lock on a directory; None if another process holds it, or without locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def one_at_a_time(directory: pathlib.Path) -> Iterator[None]:
    """Wait for others who are in this block for the same directory; do not wait where there are no locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole(path: pathlib.Path, alone: bool = True) -> Iterator[pathlib.Path]:
    """A name beside `path` to write: what is there at the end takes its place, so that no reader meets a part of it.

    Who is killed leaves that name behind, and takes it again; unless he is `alone`, every process has its own.
    """
    temporary = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def link_or_copy(source: pathlib.Path, target: pathlib.Path) -> bool:
    """A file that never changes under a second name: whether by a hard link, else by a copy, which is whole or absent.

    What is there already is left as it is.
    """
    if target.exists():
        return os.path.samefile(source, target)
    try:
        os.link(source, target)
        return True
    except FileNotFoundError:
        raise
    except OSError:  # Another file system, one without links, or too many of them.
        with whole(target) as temporary:
            shutil.copyfile(source, temporary)
        return False


def require_input_file(flag: str, value: str) -> None:
    """ConfigError naming `--flag` unless that is a file that can be read. "" is no file."""
    if not value:
        return
    path, name = pathlib.Path(value), f"--{flag}={value}"
    require(path.exists(), f"{name} does not exist; name a file")
    require(not path.is_dir(), f"{name} is a directory; name a file")
    require(os.access(path, os.R_OK), f"{name} may not be read; name another file, or let this user read it")


def require_output_file(flag: str, value: str | None) -> None:
    """ConfigError naming `--flag` unless a file can be written there; for use before the work. "" is no file."""
    if not value:
        return
    path, name = pathlib.Path(value), f"--{flag}={value}"
    try:
        require(not path.is_dir(), f"{name} is a directory; name a file in it")
        usual = not os.path.lexists(path) or path.is_file() or path.is_char_device() or path.is_fifo()
        require(usual, f"{name} is nothing that can be written; name another file")
        _require_usable_directory(name, path.parent)
        held = path if path.exists() else path.parent
        require(os.access(held, os.W_OK), f"{name}: {held} may not be written; name another file")
    except OSError as error:  # As a name that is too long.
        raise ConfigError(f"{name} cannot be written ({error.strerror}); name another file") from error


def require_output_directory(flag: str, path: pathlib.Path) -> None:
    """ConfigError naming `--flag` unless files can be written in that directory, which need not be there yet."""
    name = f"--{flag}={path}"
    try:
        above = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        require(above.is_dir(), f"{name} must be a directory, but {above} is a file; name another")
        require(os.access(above, os.W_OK | os.X_OK), f"{name}: {above} may not be written; name another directory")
    except OSError as error:
        raise ConfigError(f"{name} cannot be a directory ({error.strerror}); name another") from error


def _require_usable_directory(name: str, directory: pathlib.Path) -> None:
    above = next(place for place in (directory, *directory.absolute().parents) if os.path.lexists(place))
    require(above.is_dir(), f"{name}: {above} is not a directory; name another file")
    require(above == directory, f"{name}: there is no directory {directory}; make it, or name another file")
    require(os.access(directory, os.X_OK), f"{name}: {directory} may not be entered; name another file")
