"""Many processes as one run: how they find each other, agree, and end together. Nothing happens at import."""

import contextlib
import faulthandler
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from dlrm_jax.config import ConfigError, differences, require, tell

JOIN_SECONDS = 120
"""How long a process waits for the others."""

_DAY = 24 * 3600 * 1000
"""Milliseconds that those who have met wait for each other, as for one with a slow disk; one that dies is noticed."""

HEARTBEAT_SECONDS = 15
"""A process that is silent for so long is taken for dead, and the others end."""


Held = TypeVar("Held")


class Disagreement(ConfigError):
    """What all processes raise together, as where their settings differ."""


def join(
    coordinator_address: str, num_processes: int, process_id: int, settings: Mapping[str, Any] | None = None
) -> None:
    """Make this process one of several, by the flags or by the cluster's environment; alone if neither says so.

    Must run before anything touches a device. ConfigError for flags that do not go together, Disagreement where the
    processes' `settings` differ; where others do not come the process ends, in one line.
    """
    given = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if any(given):
        require(
            all(given),
            "--coordinator_address, --num_processes and --process_id go together; give all three, as "
            "--coordinator_address=HOST:1234 --num_processes=2 --process_id=0",
        )
        require(process_id < num_processes, f"--process_id={process_id} is not below --num_processes={num_processes}")
        _initialize(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
    elif _in_a_cluster():
        _initialize()
    agree(
        "flags", {**(settings or {}), "num_processes": distributed.global_state.num_processes, "jax": jax.__version__}
    )


def agree(what: str, settings: Mapping[str, Any]) -> None:
    """Disagreement, in all processes, unless all have the same `settings`; every process must ask, once for a `what`.

    They meet in the coordinator's store: where they differ, a collective of the devices would hang or abort.
    """
    state = distributed.global_state
    if state.client is None:
        return
    text = json.dumps(settings, sort_keys=True)
    try:
        state.client.key_value_set(f"{what}/digest/{state.process_id}", hashlib.sha256(text.encode()).hexdigest())
        state.client.key_value_set(f"{what}/text/{state.process_id}", text)
        state.client.wait_at_barrier(f"{what} are there", _DAY)
        found = state.client.key_value_dir_get(f"{what}/digest/")
        digests = {int(key.rpartition("/")[2]): digest for key, digest in found}
        other = next((number for number in sorted(digests) if digests[number] != digests[0]), None)
        if other is None:
            return
        first, second = (
            json.loads(state.client.blocking_key_value_get(f"{what}/text/{number}", _DAY)) for number in (0, other)
        )
        _let_all_read(what)
    except RuntimeError as error:
        raise ConfigError(
            f"the processes could not compare their {what}: {' '.join(str(error).split())[:300]}"
        ) from error
    raise Disagreement(
        f"the processes have different {what} (process 0 != process {other}): {tell(differences(first, second))}; "
        "start all with the same"
    )


def first_does(what: str, work: Callable[[], None]) -> None:
    """`work` by the first process, for whose end the others wait while it lives; what it raises is raised by all.

    Every process must ask, once for a `what`.
    """
    client = distributed.global_state.client
    if client is None:
        return work()
    failure = ""
    if is_first():
        try:
            work()
        except Exception as error:
            failure = str(error) or type(error).__name__
        client.key_value_set(what, failure)
    else:
        failure = client.blocking_key_value_get(what, _DAY)
    _let_all_read(what)
    if failure:
        raise Disagreement(failure)


def _let_all_read(what: str) -> None:
    """Wait until every process has read what is in the store; before that the first must not end, and it with it."""
    client = distributed.global_state.client
    assert client is not None
    client.wait_at_barrier(f"{what} is known to all", _DAY)


def _in_a_cluster() -> bool:
    """Whether SLURM or a TPU pod started this process as one of several."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return (tasks.isdecimal() and int(tasks) > 1) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _initialize(**who: Any) -> None:
    # When another process dies JAX says so and aborts; what Python would add is where this one was, at length.
    faulthandler.disable()
    errors: list[Exception] = []

    def meet() -> None:
        try:
            jax.distributed.initialize(
                **who, initialization_timeout=10 * JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
            )
        except Exception as error:
            errors.append(error)

    # In a thread, since JAX aborts when its own wait is over, and hears no signal meanwhile.
    thread = threading.Thread(target=meet, daemon=True, name="meet")
    thread.start()
    thread.join(JOIN_SECONDS)
    reason = f"not all came within {JOIN_SECONDS} s" if thread.is_alive() else str(*errors)
    if reason:
        flags = " ".join(f"--{name}={value}" for name, value in who.items()) or "by the cluster"
        _end(
            f"the processes did not find each other ({flags}): {reason}; start each, with the same "
            "--coordinator_address and --num_processes, and a --process_id of its own"
        )


def is_first() -> bool:
    """Whether this process writes what is written once: logs, metrics, results."""
    return jax.process_index() == 0


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def largest(value: int) -> int:
    """The largest of all processes' `value`; every process must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def from_first(values: np.ndarray) -> np.ndarray:
    """The first process's `values`, of one shape and type in all; every process must ask."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def of_all(values: np.ndarray) -> np.ndarray:
    """(processes, ...): the `values` of each, of one shape and type in all; every process must ask."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))


@contextlib.contextmanager
def first_holds(held: contextlib.AbstractContextManager[Held], refusal: str) -> Iterator[Held | None]:
    """What the first process enters for all of them, None in the others.

    Where it cannot, for a ConfigError or an OSError, all raise: the others ConfigError with `refusal`.
    """
    entered: Held | None = None
    error: Exception = ConfigError(refusal)
    failed = False
    with contextlib.ExitStack() as stack:
        if is_first():
            try:
                entered = stack.enter_context(held)
            except (ConfigError, OSError) as found:
                error, failed = found, True
        if largest(int(failed)):
            raise error
        yield entered


@contextlib.contextmanager
def ending_together(but_for: type[Exception]) -> Iterator[None]:
    """What stops this process stops the others: they notice that it is gone, where a tidy exit would wait for them.

    `but_for` is what all processes raise together.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, but_for | Disagreement):
            raise
        _end(f"process {jax.process_index()}: {error}")


def leave() -> None:
    """Tell the others that this process is going, and wait for those that go too.

    Process 0 serves the others: gone before them, it takes their answers along, and JAX aborts them.
    """
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()


def _end(reason: str) -> NoReturn:
    """End this process in one line; a tidy exit would wait for the others, or add JAX's own words."""
    print(f"error: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    os._exit(1)
