"""A server in a process of its own, as a user starts it, for tests that ask it over loopback."""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.helpers import ROOT


class RunningServer:
    """`python -m dlrm_jax.serve` and what it logs."""

    START = ("-m", "dlrm_jax.serve")

    def __init__(self, model_dir: pathlib.Path, *flags: str, open_files: int | None = None) -> None:
        command = [sys.executable, *self.START, f"--model={model_dir}", "--port=0"]
        command += ["--max_wait_ms=20000", *flags]  # Tests share the machine with each other.
        if open_files is not None:
            command = ["bash", "-c", f'ulimit -n {open_files}; exec "$@"', "-", *command]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self.reads = threading.Event()
        """While it is not set nobody reads the log."""
        self.reads.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.event("listening")["port"])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self.reads.wait()

    def event(self, name: str, seconds: float = 90, **fields: Any) -> dict[str, Any]:
        """The first log line of this event with these fields, once it is there."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in list(self.lines):
                values = json.loads(line) if line.startswith("{") else {}
                if values.get("event") == name and fields.items() <= values.items():
                    return values
            if self.process.poll() is not None:
                self._reader.join(5)
                raise AssertionError("".join(self.lines))
            time.sleep(0.02)
        raise AssertionError(f"no event {name} {fields} in {self.lines}")

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, body: JSON parsed) of one request."""
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json"} | (headers or {})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            data = response.read()
            kind = response.headers.get("content-type", "")
            return response.status, dict(response.headers), json.loads(data) if "json" in kind else data

    def stop(self) -> int:
        """End it as an orchestrator does; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def running(
    model_dir: pathlib.Path, *flags: str, ready: bool = True, open_files: int | None = None
) -> Iterator[RunningServer]:
    """A server for the length of a block."""
    server = RunningServer(model_dir, *flags, open_files=open_files)
    try:
        if ready:
            server.event("model_ready")
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(30)
