"""Many processes as one run: how they find each other, agree, and end together. Nothing happens at import."""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dlrm_jax.config import ConfigError, require

HEARTBEAT_SECONDS = 15
"""A process that is silent for so long is taken for dead, and the others end."""


def join(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Make this process one of several, by the flags or by the cluster's environment; alone if neither says so.

    Must run before anything touches a device. ConfigError for flags that do not go together or a coordinator that
    cannot be reached.
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


def _in_a_cluster() -> bool:
    """Whether SLURM or a TPU pod started this process as one of several."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return (tasks.isdecimal() and int(tasks) > 1) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _initialize(**who: Any) -> None:
    # When another process dies JAX says so and aborts; what Python would add is where this one was, at length.
    faulthandler.disable()
    try:
        jax.distributed.initialize(**who, initialization_timeout=120, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes did not find each other ({who or 'by the cluster'}): {error}") from error


def is_first() -> bool:
    """Whether this process writes what is written once: logs, metrics, results."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest of all processes' `value`; every process must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


@contextlib.contextmanager
def ending_together(but_for: type[Exception]) -> Iterator[None]:
    """What stops this process stops the others: they notice that it is gone, where a tidy exit would wait for them.

    `but_for` is what all processes raise together.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, but_for):
            raise
        print(f"error: process {jax.process_index()}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)
