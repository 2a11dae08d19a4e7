"""What a server tells of itself: Prometheus metrics, JSON lines, and the last seconds for the status page."""

import collections
import contextlib
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_RECENT = 50_000
_SUMMARY_SECONDS = 0.5
"""So long a summary of the last requests, which takes ten milliseconds, is the answer to all who ask for it."""
_WAITING_LINES = 10_000
_FLUSH_SECONDS = 2.0
STAGES = ("accept", "read", "parse", "queue", "compute", "total")
"""From its head's arrival to the server's turn, its body, its numbers, the wait for a batch, the batch; and all."""

LOG = logging.getLogger("dlrm_jax.serving")


class Telemetry:
    """Counters of one server; used by its event loop alone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds = Histogram(
            "dlrm_stage_seconds",
            "Seconds of a request by stage.",
            ["stage"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._stages = {stage: seconds.labels(stage) for stage in STAGES}
        self._responses = Counter("dlrm_responses_total", "Responses.", ["status"], registry=self.registry)
        self._by_status: dict[int, Any] = {}
        self._batch_rows = Histogram(
            "dlrm_batch_rows", "Rows of an executed batch.", buckets=_ROW_BUCKETS, registry=self.registry
        )
        self._request_rows = Histogram(
            "dlrm_request_rows", "Rows of a request.", buckets=_ROW_BUCKETS, registry=self.registry
        )
        self.queued_rows = Gauge("dlrm_queued_rows", "Rows that wait for a batch.", registry=self.registry)
        self._rejected = Counter("dlrm_rejected_total", "Requests not scored.", ["reason"], registry=self.registry)
        self._unknown = Counter(
            "dlrm_unknown_values_total", "Values that training did not know.", ["feature"], registry=self.registry
        )
        self._version = Gauge("dlrm_model_version", "The version that answers.", registry=self.registry)
        self._reloads = Counter("dlrm_reloads_total", "Versions loaded or refused.", ["result"], registry=self.registry)
        self._freshness = Gauge(
            "dlrm_freshness_seconds",
            "Seconds from the first and the last update that a published version has to the first score by it.",
            ["update"],
            registry=self.registry,
        )
        self.freshness: dict[str, float] = {}
        """By update: first, last."""
        self._awaited: tuple[int, dict[str, float]] | None = None
        self._recent: collections.deque[tuple[float, float, int]] = collections.deque(maxlen=_RECENT)
        self._summary: tuple[float, dict[str, float | None]] = (-math.inf, {})
        self.started = time.time()

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a request took so long."""
        self._stages[name].observe(seconds)

    def response(self, status: int) -> None:
        """A response was sent."""
        if status not in self._by_status:
            self._by_status[status] = self._responses.labels(str(status))
        self._by_status[status].inc()

    def scored(self, rows: int, seconds: float) -> None:
        """A request of so many rows was answered."""
        self._request_rows.observe(rows)
        self.stage("total", seconds)
        self._recent.append((time.monotonic(), seconds, rows))

    def batch(self, rows: int, version: int) -> None:
        """A batch was executed, by a version."""
        self._batch_rows.observe(rows)
        if self._awaited is not None and self._awaited[0] == version:
            now, updated = time.time(), self._awaited[1]
            self.freshness, self._awaited = {which: round(now - then, 3) for which, then in updated.items()}, None
            for which, seconds in self.freshness.items():
                self._freshness.labels(which).set(seconds)
            log("first_score", version=version, seconds_since_update=self.freshness)

    def rejected(self, reason: str) -> None:
        """A request was turned away."""
        self._rejected.labels(reason).inc()

    def unknown(self, counts: dict[str, int]) -> None:
        """Values that training did not know, by feature."""
        for feature, count in counts.items():
            self._unknown.labels(feature).inc(count)

    def loaded(self, version: int, updated: dict[str, float]) -> None:
        """A version answers from now on, whose `updated` first and last update were then (time.time())."""
        self._version.set(version)
        self._awaited = (version, updated) if updated else None
        self._reloads.labels("loaded").inc()

    def refused(self) -> None:
        """A new version was not taken."""
        self._reloads.labels("refused").inc()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def recently(self, seconds: float = 10.0) -> dict[str, float | None]:
        """Requests and rows a second and latency percentiles (ms) of the last seconds; made once for all who ask."""
        now, (made, summary) = time.monotonic(), self._summary
        if now - made > _SUMMARY_SECONDS:
            summary = self._summarised(now - seconds, seconds)
            self._summary = now, summary
        return summary

    def _summarised(self, since: float, seconds: float) -> dict[str, float | None]:
        last = [item for item in self._recent if item[0] >= since]
        out: dict[str, float | None] = {
            "requests_per_second": round(len(last) / seconds, 1),
            "rows_per_second": round(sum(item[2] for item in last) / seconds, 1),
        }
        latencies = np.array([item[1] for item in last])
        for percentile in (50, 90, 99):
            key = f"p{percentile}_ms"
            out[key] = round(float(np.percentile(latencies, percentile)) * 1e3, 2) if last else None
        return out


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """One structured line."""
    LOG.log(level, event, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A log record as one line of JSON: time, level, event, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Unhindered(logging.Handler):
    """Writes lines in a thread of its own: who reads them may stall. Lines beyond a bound are dropped and counted."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._dropped = descriptor, 0
        self._lines: queue.Queue[str] = queue.Queue(_WAITING_LINES)
        self.setFormatter(JsonLines())
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line; never wait."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def _write_all(self) -> None:
        while True:
            self._write(self._lines.get())
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._write(json.dumps({"level": "warning", "event": "lines_dropped", "lines": dropped}))
            self._lines.task_done()

    def _write(self, line: str) -> None:
        # Past Python's own buffer, whose lock a stalled write would hold when the process ends.
        rest = line.encode("utf8", "replace") + b"\n"
        with contextlib.suppress(OSError):  # Nobody reads any more.
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def flush(self) -> None:
        """Wait until all lines are written, but not for a reader that stalls."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, _FLUSH_SECONDS)


def log_to_stderr(level: str) -> Unhindered:
    """Send the server's events there from now on, as JSON lines."""
    handler = Unhindered(sys.stderr.fileno())
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(level.upper())
    return handler
