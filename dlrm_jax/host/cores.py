"""How many cores there are for this process."""

import math
import os
import pathlib

_CPU_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")


def cores(quota: pathlib.Path = _CPU_QUOTA) -> int:
    """Cores that this process may use: of its machine, and of its container's share."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        microseconds, period = quota.read_text().split()
        return max(1, min(here, math.ceil(int(microseconds) / int(period))))
    except (OSError, ValueError):  # No control groups, or no limit: "max".
        return here
