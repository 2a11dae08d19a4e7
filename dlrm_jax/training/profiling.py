"""Some steps of a run under JAX's profiler: a trace in the workdir, and where their time went."""

import collections
import logging
import pathlib
import re
from typing import Any, Protocol

import jax

from dlrm_jax.config import require
from dlrm_jax.training import step_parts

TRACE = "profile"
"""The trace's directory in a run's workdir."""
_MOST_OPERATIONS = 12
_LOG = logging.getLogger("dlrm_jax")


def read_steps(text: str) -> tuple[int, int] | None:
    """(first, last) of `FIRST:LAST`; None for an empty text, ConfigError for another."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text, re.ASCII)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    require(first < last, f"profile_steps is {text!r}; give two numbers of steps, the first below the last, as 100:110")
    return first, last


class Stepping(Protocol):
    """What dispatches steps (stepper.py)."""

    @property
    def executable(self) -> Any:
        """The step compiled last."""


class StepsTrace:
    """Traces what is dispatched from the first step on, until the last one is done or the run ends.

    A context manager; in several processes the first one traces. Steps that the device takes in one go are all in.
    """

    def __init__(self, asked: str, workdir: pathlib.Path, traces: bool) -> None:
        self._steps = read_steps(asked) if traces else None
        self._directory = workdir / TRACE
        self._began_at: int | None = None
        self._last: Any = None

    def __enter__(self) -> "StepsTrace":
        return self

    def before(self, step: int, state: Any) -> None:
        """`step` are done, and the next is about to be dispatched."""
        if self._steps is None or self._began_at is not None or step < self._steps[0]:
            return
        jax.block_until_ready(state.step)
        jax.profiler.start_trace(str(self._directory))
        self._began_at = step

    def after(self, step: int, state: Any, stepper: Stepping) -> None:
        """`step` have been dispatched by `stepper`; `state` is the last one's."""
        if self._began_at is None or self._steps is None:
            return
        self._last = (step, stepper.executable)
        if step >= self._steps[1]:
            jax.block_until_ready(state)
            self._end()

    def __exit__(self, *_: Any) -> None:
        if self._began_at is not None:
            self._end()
        elif self._steps is not None:
            _LOG.warning("the run ended before step %d: nothing was traced", self._steps[0])

    def _end(self) -> None:
        began_at, self._began_at, self._steps = self._began_at, None, None
        jax.profiler.stop_trace()
        if self._last is None:
            return
        step, executable = self._last
        text = executable.as_text()
        table = format_operations(step_parts.events_in(self._directory, text), text, step - (began_at or 0))
        _LOG.info(
            "steps %d to %d, traced in %s (tensorboard, ui.perfetto.dev)\n%s", began_at, step, self._directory, table
        )


def format_operations(events: list[step_parts.Event], hlo_text: str, steps: int) -> str:
    """The share of each part, and the operations that took most, with where in the program they stand."""
    parts, scopes = step_parts.parts_of(hlo_text), step_parts.scopes_of(hlo_text)
    shares = step_parts.shares(events, parts)
    if not shares:
        return "the profiler saw no operation of the step"
    nanoseconds: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.operation in parts:
            nanoseconds[event.operation] += round(event.end - event.start)
    lines = ["  ".join(f"{part} {share:.1%}" for part, share in shares.items()), "ms a step  part           operation"]
    for operation, time in nanoseconds.most_common(_MOST_OPERATIONS):
        where = f"{operation}  {scopes.get(operation, '')[-80:]}".rstrip()
        lines.append(f"{time / steps / 1e6:9.3f}  {parts[operation]:13}  {where}")
    return "\n".join(lines)
