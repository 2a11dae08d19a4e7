"""Memory at hand, of this machine and of its devices; and one line for what does not fit into it.

A process that asks for more than there is dies without a word (Linux ends it), or by an abort in a library's thread,
so what a command needs is held against what there is before anything is made.
"""

import _thread
import contextlib
import ctypes
import errno
import os
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

from dlrm_jax.config import ConfigError
from dlrm_jax.host import heap

TRY_ANYWAY = "--allow_oversubscription tries all the same"
TRY_ANYWAY_HELP = "Begin also what is predicted not to fit into the memory at hand."
_ROOT = pathlib.Path("/")
_GROUPS = {
    "memory.max": ("memory.current", "inactive_file"),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}
"""A control group's file with its limit -> the file with what it uses, and the part of that which is given back."""


def host_total(root: pathlib.Path = _ROOT) -> int | None:
    """Bytes of memory that this process may use at most: its machine's, or its container's share; None: unknown."""
    limits = [limit for _, limit in _group_limits(root)]
    if (total := _meminfo(root).get("MemTotal")) is not None:
        limits.append(total)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def host_available(root: pathlib.Path = _ROOT) -> int | None:
    """Bytes of memory that this process can still get: of its machine, its control groups, its own limits (ulimit)."""
    found = [_headroom(folder, limit) for folder, limit in _group_limits(root)]
    if (free := _meminfo(root).get("MemAvailable")) is not None:
        found.append(free + _meminfo(root).get("SwapFree", 0))
    status = _numbers(root / "proc/self/status")
    for used, most in _own_limits().items():
        if used in status:
            found.append(max(0, most - status[used] + heap.kept_bytes()))
    return min(found, default=None)


def _own_limits() -> dict[str, int]:
    """The process's own limits (ulimit -v, -d) that are set, in bytes, under the kernel's name of what counts."""
    limits = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
    found = {used: resource.getrlimit(limit)[0] for used, limit in limits.items()}
    return {used: most for used, most in found.items() if most != resource.RLIM_INFINITY}


def require_threads() -> None:
    """ConfigError where the libraries' threads cannot all start: some of them wait for these for ever, or abort.

    A thread needs addresses for its stack, so that `ulimit -v` is a limit to threads, as are `ulimit -u` and a
    container's.
    """
    if _own_limits():
        heap.share_one()
    # Each waits in C for the lock, which takes no memory: Python's own threads are waited for until they are under way.
    lock, started = _thread.allocate_lock(), 0
    lock.acquire()
    needed = _THREADS + _THREADS_OF_A_CORE * (os.cpu_count() or 1)
    try:
        for _ in range(needed):
            _thread.start_new_thread(lock.acquire, ())
            started += 1
        room = host_available()
    except (RuntimeError, MemoryError):
        room = 0
    end = time.monotonic() + 1
    for _ in range(started):
        if lock.locked():
            lock.release()
        while not lock.locked() and time.monotonic() < end:  # Until the next one has it, if that is alive.
            time.sleep(0)
    if room is not None and room < _ROOM_BESIDE_THREADS:
        raise ConfigError(
            f"no room for the {needed} threads that the libraries start, and {gigabytes(_ROOM_BESIDE_THREADS)} beside "
            "them; raise the limit of this process (ulimit -v, -d, -u) or container"
        )


def device_available(device: Any) -> int | None:
    """Bytes that a device can still give; None for a CPU, which has the host's, and where the backend does not say."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    if not stats or not stats.get("bytes_limit"):
        return None
    return max(0, int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0)))


def device_total(device: Any, num_devices: int) -> int | None:
    """Bytes that a device has in all; a CPU's `num_devices` share the host's."""
    if device.platform == "cpu":
        total = host_total()
        return None if total is None else total // num_devices
    stats = device.memory_stats() or {}
    return int(stats["bytes_limit"]) if stats.get("bytes_limit") else None


def _meminfo(root: pathlib.Path) -> dict[str, int]:
    return _numbers(root / "proc/meminfo")


def _numbers(path: pathlib.Path) -> dict[str, int]:
    """The lines `name: number kB` and `name number` of a file of the kernel's, in bytes."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {
        parts[0]: int(parts[1]) * (1024 if parts[-1] == "kB" else 1)
        for parts in lines
        if len(parts) > 1 and parts[1].isdecimal()
    }


def _group_limits(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, int]]:
    """(folder, bytes) of each control group around this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inside = top / path.lstrip("/")
        # Inside a container the path is the host's, and the container's own group is at the top.
        for folder in dict.fromkeys([*(f for f in (inside, *inside.parents) if f.is_relative_to(top)), top]):
            for name in _GROUPS:
                text = _text(folder / name)
                if text.isdecimal() and int(text) < 2**60:  # Version 1 has a large number for "no limit".
                    yield folder, int(text)


def _headroom(folder: pathlib.Path, limit: int) -> int:
    for used, given_back in _GROUPS.values():
        text = _text(folder / used)
        if text.isdecimal():
            return max(0, limit - int(text) + _numbers(folder / "memory.stat").get(given_back, 0))
    return limit


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def held_by(program: Any) -> int:
    """Bytes that a compiled program holds on a device, by XLA's account: arguments, temporaries, results of its own."""
    analysis = program.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + results


def gigabytes(num_bytes: float) -> str:
    """`12.34 GB`."""
    return f"{num_bytes / 1e9:.2f} GB"


def require_room(
    what: str, needed: float, available: float | None, where: str, largest: str, remedy: str, oversubscribe: bool
) -> None:
    """ConfigError, with the largest holder and what would make it fit, where `what` needs more than is `available`."""
    if oversubscribe or available is None or needed <= available:
        return
    raise ConfigError(
        f"{what} needs {gigabytes(needed)} of {where}, {gigabytes(available)} are free; most of it is {largest}; "
        f"what would fit: {remedy}; {TRY_ANYWAY}"
    )


def is_exhausted(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, NumPy's, Arrow's, XLA's."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def ran_out(error: BaseException) -> str:
    """What a failed allocation asked for, in a few words."""
    first = next(iter(str(error).splitlines()), "").removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    return f"memory ran out ({first[:200] or type(error).__name__})"


@contextlib.contextmanager
def named(largest: str, remedy: str) -> Iterator[None]:
    """An allocation that fails inside becomes a ConfigError with the largest holder and what would make it fit."""
    rest = f"most of it is {largest}; what would fit: {remedy}"
    _said.append(f"error: memory ran out; {rest}\n".encode())
    try:
        yield
    except Exception as error:
        if not is_exhausted(error):
            raise
        raise ConfigError(f"{ran_out(error)}; {rest}") from error
    finally:
        _said.pop()


_THREADS, _THREADS_OF_A_CORE = 64, 8
"""What array_record starts at the first file, on any machine; and what XLA, Orbax and TensorStore do, measured."""
_ROOM_BESIDE_THREADS = 256 << 20

_said = [b"error: memory ran out; a smaller model, batch or data set would fit\n"]
"""What is said, the last of it, of an allocation that fails in a thread of a library's."""
_kept: list[Any] = []
_BAD_ALLOC, _NO_THREAD = b"St9bad_alloc", b"St12system_error"
_RESERVE_BYTES = 1 << 20


def end_in_one_line() -> None:
    """C++ ends the process where a thread of a library's gets no memory: from now on by one line, not by a stack trace.

    Nothing happens where the C++ library is none that can be told so.
    """
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, kind = library["_ZSt13set_terminatePFvvE"], library["__cxa_current_exception_type"]
    except (OSError, AttributeError):
        return
    set_terminate.restype = kind.restype = ctypes.c_void_p

    reserve = [bytearray(_RESERVE_BYTES)]

    def ended() -> None:
        reserve.clear()  # So that there is some for this.
        try:
            type_info = kind()
            # Its second word is the address of its name.
            name = ctypes.string_at(ctypes.c_void_p.from_address(type_info + 8).value or 0) if type_info else b""
            exhausted = name in (_BAD_ALLOC, _NO_THREAD)
        except MemoryError:
            exhausted = True
        if not exhausted:
            previous()
        os.write(2, _said[-1])
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None)(ended)
    previous = ctypes.CFUNCTYPE(None)(set_terminate(handler))
    _kept.append(handler)
