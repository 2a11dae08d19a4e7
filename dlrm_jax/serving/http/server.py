"""Running the application: uvicorn with a bound on headers, an orderly end, and a reload on SIGHUP."""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dlrm_jax.config import ConfigError
from dlrm_jax.serving.artifact.loaded import BATCH_SIZES, MakeEngine, OneDevice, Servable
from dlrm_jax.serving.artifact.store import Version, newest_whole
from dlrm_jax.serving.http.app import ARRIVED, REFUSE, Refusal, Service, make_app
from dlrm_jax.serving.http.asgi import JSON, Limits
from dlrm_jax.serving.http.batching import Batcher
from dlrm_jax.serving.http.repository import Repository
from dlrm_jax.serving.http.telemetry import LOG, JsonLines, Telemetry, log

_MAX_HEADER_BYTES = 64 << 10
_HEADER_SECONDS = 10.0
_SWITCH_SECONDS = 5e-4


@dataclasses.dataclass(frozen=True)
class Settings:
    """A server. Seconds, bytes and rows; `port` 0 takes a free one."""

    model_dir: pathlib.Path
    host: str = "127.0.0.1"
    port: int = 8000
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    max_delay: float = 0.0
    max_queued_rows: int = 8192
    max_wait: float = 0.05
    max_bag: int = 1000
    poll_seconds: float = 5.0
    drain_seconds: float = 10.0
    max_connections: int = 2000
    limits: Limits = dataclasses.field(default_factory=Limits)
    token: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    log_level: str = "info"
    access_log: bool = False
    make_engine: MakeEngine = OneDevice


class _Protocol(HttpToolsProtocol):
    """Ends a connection whose request line and headers are too long, or take too long; refuses by the head alone.

    A refusal for the load is written here, without a task and past the application: in an overload most requests are
    refused, and what that costs is taken from those that are served.
    """

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    _refused = False

    def connection_made(self, transport: Any) -> None:
        """A client is there; its first request is awaited."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > _MAX_HEADER_BYTES and not self.transport.is_closing():
            body = b'{"error":"headers are too long"}'
            head = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            self.transport.write(head + b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(body), body))
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        if not self._in_head:
            self._await_head()

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
        refusal = self._refusal()
        self._refused = refusal is not None
        if refusal is not None:
            self._write(refusal)
            self._timer = self.loop.call_later(_HEADER_SECONDS, self.transport.close)  # If the body does not come.
            return
        super().on_headers_complete()
        self.scope["state"][ARRIVED] = time.monotonic()

    def on_body(self, body: bytes) -> None:
        """Some of its body; nobody reads it if it is refused."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it is there; if it was refused, the next may come."""
        if not self._refused:
            super().on_message_complete()
            return
        if self._timer is not None:
            self._timer.cancel()
        self._unset_keepalive_if_required()
        if self._keeps():
            wait, end = self.timeout_keep_alive, self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(wait, end)
        else:
            self.transport.close()

    def _refusal(self) -> Refusal | None:
        """Asks the application, unless uvicorn has to see to it: answers are under way, too many clients, an end."""
        waits = self.cycle is not None and not self.cycle.response_complete
        full = self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency
        if waits or full or self.expect_100_continue or self.flow.write_paused or self.transport.is_closing():
            return None
        refuse: Callable[..., Refusal | None] = self.app_state[REFUSE]
        return refuse(self.parser.get_method(), self.url, self.headers, self.client)

    def _write(self, refusal: Refusal) -> None:
        status, body, more = refusal
        headers = [*self.server_state.default_headers, (b"content-type", JSON), *more]
        headers += [] if self._keeps() else [(b"connection", b"close")]
        lines = [STATUS_LINE[status], *(b"%s: %s\r\n" % pair for pair in headers)]
        self.transport.write(b"".join([*lines, b"content-length: %d\r\n\r\n" % len(body), body]))

    def _keeps(self) -> bool:
        """Whether another request may follow on this connection."""
        return self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._timer = self.loop.call_later(_HEADER_SECONDS, self.transport.close)


class _Server(uvicorn.Server):
    """uvicorn's server, with our way of ending: exit status 0 after a drain, and the port told when it listens."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are taken by `run`."""
        yield

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        await super().startup(sockets=sockets)
        for server in self.servers:
            for sock in server.sockets:
                log("listening", host=sock.getsockname()[0], port=sock.getsockname()[1])


def run_server(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was asked. ConfigError if there is nothing to serve."""
    _log_json_lines(settings.log_level)
    # The scoring thread asks for the interpreter a few times a batch, and a busy event loop lends it only when so much
    # time is over: with Python's own 5 ms a batch of 3 ms took 25.
    sys.setswitchinterval(_SWITCH_SECONDS)
    # What imports made stays; a full collection that goes through it stops the event loop for 40 ms, as in each reload.
    gc.collect()
    gc.freeze()
    first, refused = newest_whole(settings.model_dir)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, first, refused))


def _log_json_lines(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(level.upper())


async def _serve(settings: Settings, first: Version, refused: dict[int, str]) -> None:
    telemetry = Telemetry()
    failure: list[BaseException] = []

    def load(version: Version, like: Servable | None) -> Servable:
        return Servable(version, settings.batch_sizes, settings.max_bag, like, settings.make_engine)

    repository = Repository(settings.model_dir, load, telemetry, settings.poll_seconds)
    batcher = Batcher(
        telemetry, max(settings.batch_sizes), settings.max_delay, settings.max_queued_rows, settings.max_wait
    )
    service = Service(repository, batcher, telemetry, settings.limits, settings.access_log)

    def failed(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    app = make_app(service, lambda: repository.start(first, refused, failed), settings.token)
    server = _Server(_uvicorn_config(app, settings))

    def end(name: str) -> None:
        log("stopping", signal=name, queued_rows=batcher.queued_rows)
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number.name)
    loop.add_signal_handler(signal.SIGHUP, repository.look_now)
    try:
        await server.serve()
    except SystemExit:  # uvicorn's way to say that it cannot listen.
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}; choose another --port or --host"
        ) from None
    if failure:
        raise failure[0]
    log("stopped")


def _uvicorn_config(app: Any, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=_Protocol,
        ws="none",
        interface="asgi3",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="critical",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        limit_concurrency=settings.max_connections,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
