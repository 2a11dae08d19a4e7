"""Running the application: uvicorn with bounded connections, an orderly end, and a reload on SIGHUP."""

import asyncio
import contextlib
import dataclasses
import gc
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
import uvloop

from dlrm_jax.config import ConfigError
from dlrm_jax.serving.artifact.loaded import BATCH_SIZES, MakeEngine, OneDevice, Servable
from dlrm_jax.serving.artifact.store import Version, newest_whole
from dlrm_jax.serving.http.app import Service, make_app
from dlrm_jax.serving.http.asgi import Limits
from dlrm_jax.serving.http.batching import Batcher
from dlrm_jax.serving.http.connection import Bounds, Connection, end_overdue
from dlrm_jax.serving.http.repository import Repository
from dlrm_jax.serving.http.telemetry import Telemetry, log, log_to_stderr

_SWITCH_SECONDS = 5e-4
_RESERVE = 256
"""Open files that no connection gets, for logs and versions; a quarter of all where there are few, 64 at least."""
_WRITE_SECONDS = 10.0
_LAST_SECONDS = 1.0
"""After SIGTERM, how long connections that are kept may ask once more."""


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


class _Server(uvicorn.Server):
    """uvicorn's server, with our way of ending: exit status 0 after a drain, and the port told when it listens."""

    def __init__(self, config: uvicorn.Config, bounds: Bounds) -> None:
        super().__init__(config)
        self._bounds = bounds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are taken by `run`."""
        yield

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        await self.lifespan.startup()
        config = self.config
        loaded = {"config": config, "server_state": self.server_state, "app_state": self.lifespan.state}
        try:
            server = await asyncio.get_running_loop().create_server(
                lambda: Connection(self._bounds, **loaded),
                config.host,
                config.port,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=self._bounds.head if config.ssl else None,
            )
        except OSError:
            await self.lifespan.shutdown()
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}; choose another --port or --host"
            ) from None
        self.servers, self.started = [server], True
        for sock in server.sockets:
            log("listening", host=sock.getsockname()[0], port=sock.getsockname()[1])

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        end_overdue(self.server_state.connections)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer what is asked on connections that are kept, each a last time, then end."""
        until = time.monotonic() + min(_LAST_SECONDS, float(self.config.timeout_graceful_shutdown or 0))
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def run_server(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was asked. ConfigError if there is nothing to serve."""
    lines = log_to_stderr(settings.log_level)
    # The scoring thread asks for the interpreter a few times a batch, and a busy event loop lends it only when so much
    # time is over: with Python's own 5 ms a batch of 3 ms took 25.
    sys.setswitchinterval(_SWITCH_SECONDS)
    # What imports made stays; a full collection that goes through it stops the event loop for 40 ms, as in each reload.
    gc.collect()
    gc.freeze()
    try:
        first, refused = newest_whole(settings.model_dir)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, first, refused))
            lines.flush()
            os._exit(0)  # A version may be being read or compiled, which nothing else can stop and nobody waits for.
    finally:
        lines.flush()


def _room_for(max_connections: int) -> int:
    """`max_connections`, or as many as there can be open files, which the limit is raised for where it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _RESERVE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        max_connections = min(max_connections, max(1, soft - max(64, min(_RESERVE, soft // 4))))
        if soft < wanted:
            log("fewer_connections", level=30, max_connections=max_connections, open_files=soft)
    return max_connections


async def _serve(settings: Settings, first: Version, refused: dict[int, str]) -> None:
    telemetry = Telemetry()
    failure: list[BaseException] = []

    def load(version: Version, like: Servable | None) -> Servable:
        return Servable(version, settings.batch_sizes, settings.max_bag, like, settings.make_engine)

    batcher = Batcher(
        telemetry, max(settings.batch_sizes), settings.max_delay, settings.max_queued_rows, settings.max_wait
    )
    repository = Repository(settings.model_dir, load, telemetry, settings.poll_seconds, batcher.between)
    service = Service(repository, batcher, telemetry, settings.limits, settings.access_log)

    def failed(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    app = make_app(service, lambda: repository.start(first, refused, failed), settings.token)
    bounds = Bounds(
        _room_for(settings.max_connections),
        body=settings.limits.body_seconds + 1,  # Its reader is first to say so.
        answer=settings.limits.request_seconds + _WRITE_SECONDS,
    )
    server = _Server(_uvicorn_config(app, settings), bounds)

    def end(name: str) -> None:
        log("stopping", signal=name, queued_rows=batcher.queued_rows)
        server.should_exit = service.draining = bounds.draining = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number.name)
    loop.add_signal_handler(signal.SIGHUP, repository.look_now)
    await server.serve()
    if failure:
        raise failure[0]
    log("stopped")


def _uvicorn_config(app: Any, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        interface="asgi3",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="critical",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
