"""Requests at moments that do not depend on the answers, and how long each took from its moment on.

Connections are plain asyncio protocols around httptools' parser, so that the client costs as little as it can: on a
small machine it takes its time from the server.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import httptools
import numpy as np
import uvloop

from dlrm_jax.host.texts import aligned

_DRAIN_SECONDS = 5.0
_DISTINCT_REQUESTS = 200
_STEP = 1.25
"""--find_max_qps grows the rate by this factor, then halves the factor's distance to 1 until it is below 1.06."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A model behind an address."""

    host: str
    port: int
    name: str
    num_dense: int
    num_slots: int
    limits: tuple[int, ...]
    """Rows of each slot's table."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One rate's outcome. Latencies in seconds from the moment a request was due; NaN where no answer came."""

    qps: float
    seconds: float
    due: np.ndarray
    latency: np.ndarray
    status: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Numbers for a table."""
        served = self.latency[self.status == 200]
        refused = self.latency[np.isin(self.status, (429, 503))]
        out: dict[str, Any] = {
            "qps": round(self.qps, 1),
            "served_qps": round(len(served) / self.seconds, 1),
            "requests": len(self.due),
            "refused": len(refused),
            "failed": int((~np.isin(self.status, (200, 429, 503))).sum()),
        }
        for percentile in (50, 90, 99, 99.9):
            value = float(np.percentile(served, percentile)) * 1e3 if len(served) else float("nan")
            out[f"p{percentile:g}_ms"] = round(value, 3)
        if len(refused):
            out["refused_p99_ms"] = round(float(np.percentile(refused, 99)) * 1e3, 3)
        return out


def discover(url: str) -> Target:
    """The model of a server, by its own description."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError("give http://HOST:PORT")
    model = _get(f"{url}/status.json")["model"]
    limits = tuple(f["rows"] for f in model["features"] for _ in range(f["hotness"]))
    return Target(parts.hostname, parts.port or 80, model["name"], len(model["dense"]), len(limits), limits)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.loads(response.read())


def make_requests(target: Target, candidates: int, binary: bool, seed: int) -> list[bytes]:
    """Whole HTTP requests with random rows, ids being uniform over each table."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(_DISTINCT_REQUESTS if candidates < 100 else _DISTINCT_REQUESTS // 10):
        dense = rng.normal(size=(candidates, target.num_dense)).astype("<f4")
        ids = rng.integers(0, target.limits, (candidates, target.num_slots)).astype("<i4")
        tensors = [("dense", "FP32", dense), ("ids", "INT32", ids)][target.num_dense == 0 :]
        inputs: list[dict[str, Any]] = [{"name": n, "datatype": t, "shape": list(v.shape)} for n, t, v in tensors]
        for entry, (_, _, values) in zip(inputs, tensors, strict=True):
            if binary:
                entry["parameters"] = {"binary_data_size": values.nbytes}
            else:
                entry["data"] = [round(float(x), 4) if values.dtype.kind == "f" else int(x) for x in values.ravel()]
        output = {"name": "probability", "parameters": {"binary_data": binary}}
        head = json.dumps({"inputs": inputs, "outputs": [output]}).encode()
        more = f"inference-header-content-length: {len(head)}\r\n" if binary else ""
        body = head + b"".join(values.tobytes() for *_, values in tensors) if binary else head
        out.append(http_request(target, f"/v2/models/{target.name}/infer", body, more))
    return out


def http_request(target: Target, path: str, body: bytes, more_headers: str = "") -> bytes:
    """A POST, as bytes."""
    kind = "application/octet-stream" if more_headers else "application/json"
    return (
        f"POST {path} HTTP/1.1\r\nhost: {target.host}\r\ncontent-type: {kind}\r\n"
        f"content-length: {len(body)}\r\n{more_headers}\r\n"
    ).encode() + body


class Answer(NamedTuple):
    """What came of one request: which body it was, when it was sent and answered (time.time), what was said."""

    request: int
    sent: float
    came: float
    status: int
    body: bytes


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, idle: "_Pool") -> None:
        self._pool = idle
        self._request, self._sent, self._body = -1, 0.0, b""
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class.

    def send(self, index: int, data: bytes) -> None:
        """Ask."""
        self._request, self._sent, self._body = index, time.time(), b""
        assert self._transport is not None
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Some of what it says."""
        if self._pool.keep is not None:
            self._body += body

    def on_message_complete(self) -> None:
        """An answer is whole."""
        index, self._request, status = self._request, -1, self._parser.get_status_code()
        self._kept(index, status)
        self._pool.answered(self, index, status)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server hung up."""
        del exc
        if self._request >= 0:
            self._kept(self._request, -1)
        self._pool.lost(self, self._request)

    def _kept(self, index: int, status: int) -> None:
        if self._pool.keep is not None:
            self._pool.keep(Answer(index % self._pool.num_bodies, self._sent, time.time(), status, self._body))

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()


class _Pool:
    """Connections, and requests that are due while all of them are busy."""

    def __init__(self, bodies: list[bytes], due: np.ndarray, keep: Callable[[Answer], None] | None) -> None:
        self._bodies, self.due, self.keep, self.num_bodies = bodies, due, keep, len(bodies)
        self.latency = np.full(len(due), np.nan)
        self.status = np.zeros(len(due), np.int32)
        self._idle: collections.deque[_Connection] = collections.deque()
        self.connections: list[_Connection] = []
        self._waiting: collections.deque[int] = collections.deque()
        self.left = len(due)
        self.start = 0.0
        self.done = asyncio.Event()

    def add(self, connection: _Connection) -> None:
        """Another connection."""
        self.connections.append(connection)
        self._idle.append(connection)

    def ask(self, index: int) -> None:
        """A request is due."""
        if self._idle:
            self._idle.popleft().send(index, self._bodies[index % len(self._bodies)])
        else:
            self._waiting.append(index)

    def answered(self, connection: _Connection, index: int, status: int) -> None:
        """Its answer is there."""
        self._note(index, status)
        if self._waiting:
            index = self._waiting.popleft()
            connection.send(index, self._bodies[index % len(self._bodies)])
        else:
            self._idle.append(connection)

    def lost(self, connection: _Connection, index: int) -> None:
        """A connection is gone, with its answer if it had been asked."""
        if connection in self._idle:
            self._idle.remove(connection)
        if index >= 0:
            self._note(index, -1)

    def _note(self, index: int, status: int) -> None:
        self.latency[index] = time.perf_counter() - self.start - self.due[index]
        self.status[index] = status
        self.left -= 1
        if not self.left:
            self.done.set()


def run(
    target: Target,
    bodies: list[bytes],
    qps: float,
    seconds: float,
    connections: int = 64,
    seed: int = 0,
    keep: Callable[[Answer], None] | None = None,
) -> Run:
    """Ask for so long at this rate; `keep` gets each answer, those of status -1 too, whose connection was lost."""
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / qps, max(1, round(qps * seconds))))

    async def ask() -> _Pool:
        loop = asyncio.get_running_loop()
        pool = _Pool(bodies, due, keep)
        for _ in range(connections):
            _, connection = await loop.create_connection(lambda: _Connection(pool), target.host, target.port)
            pool.add(connection)
        pool.start = time.perf_counter()
        for index, moment in enumerate(due.tolist()):
            left = moment - (time.perf_counter() - pool.start)
            if left > 0:
                await asyncio.sleep(left)
            elif index % 16 == 0:
                await asyncio.sleep(0)  # Behind time: answers must be read all the same.
            pool.ask(index)
        with contextlib.suppress(TimeoutError):  # Status 0 says that no answer came.
            async with asyncio.timeout(_DRAIN_SECONDS):
                await pool.done.wait()
        for connection in pool.connections:
            connection.close()
        return pool

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pool = runner.run(ask())
    return Run(qps, float(due[-1]), due, pool.latency, pool.status)


def meets(outcome: Run, p99: float) -> bool:
    """Whether everything was served, and in time."""
    # What was not answered counts as late: it is NaN, which no comparison likes.
    return bool((outcome.status == 200).all() and np.percentile(outcome.latency, 99) <= p99)


def best_of(runs: list[Run], p99: float) -> Run | None:
    """The highest rate that `meets`."""
    return max((one for one in runs if meets(one, p99)), key=lambda one: one.qps, default=None)


def find_max_qps(
    target: Target, bodies: list[bytes], qps: float, p99: float, seconds: float, connections: int, seed: int
) -> list[Run]:
    """Runs at rising rates from `qps` on, then finer ones below the first that fails. A rate is tried twice to fail."""
    runs: list[Run] = []
    low, factor = 0.0, _STEP

    def holds(rate: float) -> bool:
        for attempt in range(2):
            runs.append(run(target, bodies, rate, seconds, connections, seed + attempt))
            if meets(runs[-1], p99):
                return True
        return False

    while not holds(qps):
        qps /= 2
        if qps < 1:
            return runs
    while factor > 1.06:
        low = qps
        while holds(low * factor):
            low *= factor
        qps, factor = low, 1 + (factor - 1) / 2
    return runs


def format_runs(runs: list[Run]) -> str:
    """A table, a line a rate."""
    rows = [one.summary() for one in runs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[f"{row.get(column, '-')}" for column in columns] for row in rows]
    return aligned(cells, left=())


def draw(outcome: Run, path: pathlib.Path) -> None:
    """Latencies over time, and how many were below each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    over_time, distribution = figure.subplots(1, 2)
    for statuses, label, colour in (((200,), "served", "C0"), ((429, 503), "refused", "C1")):
        chosen = np.isin(outcome.status, statuses)
        if not chosen.any():
            continue
        milliseconds = outcome.latency[chosen] * 1e3
        over_time.plot(outcome.due[chosen], milliseconds, ".", markersize=2, color=colour, label=label)
        share = (np.arange(len(milliseconds)) + 0.5) / len(milliseconds)
        distribution.plot(np.sort(milliseconds), 1 - share, color=colour, label=label)
    over_time.set(xlabel="second", ylabel="latency (ms)", yscale="log", title=f"{outcome.qps:,.0f} requests/s")
    distribution.set(xlabel="latency (ms)", ylabel="share of requests that took longer", xscale="log", yscale="log")
    for axes in (over_time, distribution):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
