"""Where a step's time goes: the profiler's events, each laid to the part of the model that its operation belongs to.

A part is a named scope of the program; XLA writes the scopes of each operation into the compiled module, and the
profiler writes the operation's name beside each event. Events overlap: an instant is shared among those that run.
"""

import collections
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from dlrm_jax.planning.hlo import COMPUTATION, KINDS

EXCHANGE, OTHER, GAPS = "exchange", "other", "launch gaps"
_SCOPES = {
    "route": "lookup",
    "lookup": "lookup",
    "interaction": "interaction",
    "numbers": "interaction",
    "bottom_mlp": "MLPs",
    "top_mlp": "MLPs",
    "dense_update": "MLPs",
    "sparse_update": "sparse update",
}
TRACED_OPTIONS: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_enable_command_buffer": ""}}
"""Of the compiler, by platform: the profiler would see a GPU's step as one operation, the command buffer it is in."""
PARTS = ("lookup", "interaction", "MLPs", "sparse update", EXCHANGE, OTHER, GAPS)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?:\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf"^({'|'.join((*KINDS, 'ragged-all-to-all'))})")
_CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")


class Event(NamedTuple):
    """An operation's run on a device, in nanoseconds."""

    operation: str
    start: float
    end: float


def parts_of(hlo_text: str) -> dict[str, str]:
    """The part of each operation of a module as `compiled.as_text()` writes it; what only contains others is left out.

    An operation whose scope says nothing, as some fusions, goes with most of what it is fused from.
    """
    own: dict[str, str] = {}
    inner: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    calls: dict[str, str] = {}
    computation = ""
    for line in hlo_text.splitlines():
        if header := COMPUTATION.match(line):
            computation = header[1]
        elif (found := _INSTRUCTION.match(line)) and found["op"] not in _CONTAINERS:
            scopes = _SCOPE.search(line)
            own[found["name"]] = part = _part(found["op"], scopes[1] if scopes else "")
            if part != OTHER:
                inner[computation][part] += 1
            if called := _CALLS.search(line):
                calls[found["name"]] = called[1]
    for name, fused in calls.items():
        if own[name] == OTHER and inner[fused]:
            own[name] = inner[fused].most_common(1)[0][0]
    return own


def scopes_of(hlo_text: str) -> dict[str, str]:
    """Where in the program each operation of a module stands, as JAX names it."""
    found = ((_INSTRUCTION.match(line), _SCOPE.search(line)) for line in hlo_text.splitlines())
    return {operation["name"]: scope[1] for operation, scope in found if operation and scope}


def _part(operation: str, scopes: str) -> str:
    if _COLLECTIVE.match(operation):
        return EXCHANGE
    # Innermost first; "transpose(jvp(bottom_mlp))" is bottom_mlp's.
    for scope in reversed(re.split(r"[/()]", scopes)):
        if scope in _SCOPES:
            return _SCOPES[scope]
    return OTHER


def shares(events: Iterable[Event], part_of: Mapping[str, str]) -> dict[str, float]:
    """Each part's share of the time from the first event to the last; `launch gaps` is when nothing ran.

    Empty if no event is of an operation in `part_of`.
    """
    known = [event for event in events if event.operation in part_of and event.end > event.start]
    if not known:
        return {}
    edges = [(e.start, 1, part_of[e.operation]) for e in known] + [(e.end, -1, part_of[e.operation]) for e in known]
    edges.sort()
    first = last = edges[0][0]
    running: collections.Counter[str] = collections.Counter()
    seconds: dict[str, float] = collections.defaultdict(float)
    for time, change, part in edges:
        count = running.total()
        for other, many in running.items() if count else ((GAPS, 1),):
            seconds[other] += (time - last) * many / max(count, 1)
        running[part] += change
        last = time
    return {part: seconds[part] / (last - first) for part in PARTS}


def profile(run: Callable[[], Any], hlo_text: str) -> list[Event]:
    """The operations of the module of this text that `run()` ran, by JAX's profiler."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        return events_in(pathlib.Path(directory), hlo_text)


def events_in(directory: pathlib.Path, hlo_text: str) -> list[Event]:
    """The operations of the module of this text in the newest trace of a directory."""
    module = hlo_text.split(maxsplit=2)[1].rstrip(",")  # "HloModule jit_train_step, is_scheduled=true ..."
    paths = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    newest = [path for path in paths if path.parent == paths[-1].parent]
    return [event for path in newest for event in _events(str(path), module)]


def _events(path: str, module: str) -> list[Event]:
    found = []
    # A class of jaxlib's lacks its module's name, which Python 3.13 deprecates; as an error it would end the process.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if stats.get("hlo_module") == module and "hlo_op" in stats:
                        found.append(Event(str(stats["hlo_op"]), event.start_ns, event.start_ns + event.duration_ns))
    return found
