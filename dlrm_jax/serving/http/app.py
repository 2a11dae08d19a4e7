"""The server's HTTP surface: the Open Inference Protocol v2, /v1/score, metrics and a page; on Starlette.

A request is read, parsed, checked and transformed on the event loop, or, if it is long, one after the other in a thread
beside it, and scored in a batch with others (batching.py).
Bad input is the client's error and names the field; nothing of one request outlives it.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dlrm_jax.serving.artifact.errors import BadRequest, Busy, TooLate, shown
from dlrm_jax.serving.artifact.loaded import Scores, Servable
from dlrm_jax.serving.artifact.transform import Inputs
from dlrm_jax.serving.http import page
from dlrm_jax.serving.http.asgi import JSON, Held, HttpError, Limits, read_body, require_type, send_whole
from dlrm_jax.serving.http.batching import Batcher
from dlrm_jax.serving.http.front import Guard, Shortcut
from dlrm_jax.serving.http.openapi import describe_api
from dlrm_jax.serving.http.protocol import (
    HEADER_LENGTH,
    infer_response,
    model_metadata,
    parse_infer,
    parse_json,
    wanted_outputs,
)
from dlrm_jax.serving.http.repository import Repository, describe
from dlrm_jax.serving.http.telemetry import Telemetry, log

ARRIVED = "arrived"
"""Key of the scope's state: when the head of a request was read, in seconds of time.monotonic()."""
Parsed = TypeVar("Parsed")
REFUSE = "refuse"
"""Key of the lifespan's state: Service.refusal, behind the token, for the protocol to ask before there is a scope."""
_SERVER = "dlrm_jax"
_SHORT_BYTES = 16 << 10
"""A body of so many bytes is parsed on the event loop: that takes milliseconds at most, and a thread's turn as long."""
_FEW_VALUES = 1 << 18
"""A request may always have so many; one of a large model as many as all its rows have, and as many again."""
_MAX_LOGGED = 256
"""Characters of a path in the log."""


class Refusal(NamedTuple):
    """An answer to a request that is not served: a status, JSON, and headers beyond those that every answer has."""

    status: int
    body: bytes
    more: tuple[tuple[bytes, bytes], ...]


@dataclasses.dataclass
class Service:
    """What the routes share."""

    repository: Repository
    batcher: Batcher
    telemetry: Telemetry
    limits: Limits
    access_log: bool = False
    draining: bool = False

    def __post_init__(self) -> None:
        self.held = Held(self.limits)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="parse")
        self._turn = asyncio.Lock()

    def servable(self) -> Servable:
        """The version that answers; Busy while there is none yet."""
        current = self.repository.current
        if current is None:
            raise Busy("the model is loading", 1.0)
        return current

    def refusal(self, method: bytes, path: bytes, client: tuple[str, int] | None) -> Refusal | None:
        """The answer to who asks for scores and would wait too long; None for who may come, and for other requests.

        Known by the head of the request, so that it costs no task.
        """
        start, current = time.monotonic(), self.repository.current
        if current is None or method != b"POST":
            return None
        if path not in (b"/v1/score", b"/v2/models/%s/infer" % current.signature.name.encode()):
            return None
        try:
            self.servable()
            self.batcher.announce()
        except Busy as error:
            refusal = refusal_of(self, path.decode("latin-1"), error)
            self.telemetry.response(refusal.status)
            if self.access_log:
                _log_request("POST", path.decode("latin-1"), refusal.status, start, client)
            return refusal
        return None

    def named(self, scope: Scope) -> Servable:
        """The version that a path names."""
        servable, path = self.servable(), scope["path_params"]
        if path["name"] != servable.signature.name:
            raise HttpError(404, f"no model {shown(path['name'])}; this server has {servable.signature.name!r}")
        self.require_version(scope, servable.version.number)
        return servable

    def require_version(self, scope: Scope, number: int) -> None:
        """HttpError where a path names another version."""
        wanted = scope["path_params"].get("version", str(number))
        if wanted != str(number):
            raise HttpError(404, f"version {shown(wanted)} is not loaded; {number} is")

    def max_values(self, servable: Servable) -> int:
        """How many values a request may have."""
        signature = servable.signature
        return max(_FEW_VALUES, 2 * self.limits.max_rows * (len(signature.dense_names) + signature.num_slots))

    async def parsed(self, size: int, deadline: float, parse: Callable[[], Parsed]) -> Parsed:
        """What `parse` makes of a body of `size` bytes; TooLate at `deadline` (time.monotonic())."""
        if size <= _SHORT_BYTES:
            return parse()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._turn.acquire()
                parsing = loop.run_in_executor(self._thread, parse)
                parsing.add_done_callback(lambda _: self._turn.release())
                return await asyncio.shield(parsing)  # A thread cannot be stopped: the next waits until it is done.
        except TimeoutError:
            raise TooLate(f"not read within {self.limits.request_seconds:g} s") from None

    async def score(self, servable: Servable, dense: Any, ids: Any, deadline: float) -> Scores:
        """Scores within the request's time."""
        if len(dense) > self.limits.max_rows:
            raise BadRequest(f"{len(dense)} rows in one request; at most {self.limits.max_rows}")
        return await self.batcher.score(servable, dense, ids, deadline)


Handler = Callable[[Service, Scope, Receive, Send], Awaitable[int]]


class _Endpoint:
    """A handler as an ASGI application: errors become statuses, answers are counted."""

    def __init__(self, service: Service, handler: Handler) -> None:
        self._service, self._handler = service, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, start = self._service, time.monotonic()
        try:
            status = await self._handler(service, scope, receive, send)
        except Exception as error:
            status, body, more = refusal_of(service, scope["path"], error)
            await send_whole(send, status, body, JSON, *more)
        service.telemetry.response(status)
        if service.access_log:
            arrived = scope.get("state", {}).get(ARRIVED, start)
            _log_request(scope["method"], scope["path"], status, arrived, scope.get("client"))


def _log_request(method: str, path: str, status: int, arrived: float, client: tuple[str, int] | None) -> None:
    ms = round((time.monotonic() - arrived) * 1e3, 3)
    log("request", method=method, path=path[:_MAX_LOGGED], status=status, ms=ms, client=(client or ("",))[0])


def refusal_of(service: Service, path: str, error: Exception) -> Refusal:
    """The answer that tells of an error, which is counted."""
    more: tuple[tuple[bytes, bytes], ...] = ()
    match error:
        case BadRequest():
            status, reason = 400, "bad_request"
        case HttpError():
            status, reason = error.status, "bad_request"
        case Busy():
            status, reason = (503 if service.repository.current is None or service.draining else 429), "busy"
            more = ((b"retry-after", str(math.ceil(error.retry_after)).encode()),)
        case TooLate():
            status, reason = 503, "too_late"
            more = ((b"retry-after", b"1"),)
        case _:
            status, reason = 500, "failed"
            log("request_failed", level=logging.ERROR, path=path, error=repr(error))
            logging.getLogger("dlrm_jax.serving").debug("traceback", exc_info=error)
    service.telemetry.rejected(reason)
    if reason == "bad_request":
        log("bad_request", level=logging.DEBUG, path=path[:_MAX_LOGGED], status=status, error=str(error))
    text = str(error) if status != 500 else "internal error; the server's log has it"
    return Refusal(status, orjson.dumps({"error": text.encode("utf8", "replace").decode()}), more)


def _arrival(service: Service, scope: Scope) -> tuple[float, float]:
    """(when the request's head came, now). Between them the event loop was busy with others."""
    start = time.monotonic()
    arrived = scope.get("state", {}).get(ARRIVED, start)
    service.telemetry.stage("accept", start - arrived)
    return arrived, start


async def _score(service: Service, scope: Scope, receive: Receive, send: Send) -> int:
    """POST /v1/score."""
    arrived, start = _arrival(service, scope)
    servable = service.servable()
    service.batcher.admit(waited=start - arrived)  # Before the work of reading it.
    require_type(scope, ("application/json",))
    with service.held.one_body() as holds:
        body = await read_body(scope, receive, service.limits, holds)
        read = time.monotonic()
        deadline = arrived + (read - start) + service.limits.request_seconds

        def parse() -> tuple[int, Inputs]:
            request = parse_json(body, service.max_values(servable), of_rows=True)
            rows, shared = _rows_of(request, service.limits)
            return len(rows), servable.reader.read(rows, shared, deadline if len(body) > _SHORT_BYTES else None)

        num_rows, (dense, ids, unknown) = await service.parsed(len(body), deadline, parse)
    service.telemetry.stage("read", read - start)
    service.telemetry.stage("parse", time.monotonic() - read)
    scores = await service.score(servable, dense, ids, deadline)
    answer: dict[str, Any] = {"probability": scores.probability, "model_version": str(scores.version)}
    if unknown:
        answer["unknown"] = unknown
        service.telemetry.unknown(unknown)
    await send_whole(send, 200, orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))
    service.telemetry.scored(num_rows, time.monotonic() - arrived)
    return 200


def _rows_of(request: dict[str, Any], limits: Limits) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    stray = sorted(request.keys() - {"rows", "shared"})
    if stray:
        raise BadRequest(f"unknown field {shown(stray[0])}; known are rows, shared")
    rows, shared = request.get("rows"), request.get("shared", {})
    if not isinstance(rows, list):
        raise BadRequest(f"rows is {shown(rows)}; expected a list of objects")
    if len(rows) > limits.max_rows:
        raise BadRequest(f"rows has {len(rows)} rows; at most {limits.max_rows}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadRequest(f"row {i} is {shown(row)}; expected an object")
    if not isinstance(shared, dict):
        raise BadRequest(f"shared is {shown(shared)}; expected an object")
    return rows, shared


async def _infer(service: Service, scope: Scope, receive: Receive, send: Send) -> int:
    """POST /v2/models/NAME/infer."""
    arrived, start = _arrival(service, scope)
    servable = service.named(scope)
    service.batcher.admit(waited=start - arrived)
    require_type(scope, ("application/json", "application/octet-stream"))
    with service.held.one_body() as holds:
        body = await read_body(scope, receive, service.limits, holds)
        read = time.monotonic()
        deadline = arrived + (read - start) + service.limits.request_seconds
        length = Headers(scope=scope).get(HEADER_LENGTH)

        def parse() -> tuple[dict[str, Any], list[tuple[str, bool]], np.ndarray, np.ndarray]:
            request, dense, ids = parse_infer(
                body, length, service.max_values(servable), bool(servable.signature.dense_names)
            )
            return request, wanted_outputs(request), *servable.checked(dense, ids)

        request, wanted, dense, ids = await service.parsed(len(body), deadline, parse)
    service.telemetry.stage("read", read - start)
    service.telemetry.stage("parse", time.monotonic() - read)
    scores = await service.score(servable, dense, ids, deadline)
    service.require_version(scope, scores.version)  # A delta may have come meanwhile.
    answer, head = infer_response(request, wanted, servable, scores)
    if head is None:
        await send_whole(send, 200, answer)
    else:
        await send_whole(send, 200, answer, b"application/octet-stream", (HEADER_LENGTH.encode(), str(head).encode()))
    service.telemetry.scored(len(dense), time.monotonic() - arrived)
    return 200


def _json_get(answer: Callable[[Service, Scope], tuple[int, Any]]) -> Handler:
    async def handler(service: Service, scope: Scope, receive: Receive, send: Send) -> int:
        del receive
        status, value = answer(service, scope)
        await send_whole(send, status, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
        return status

    return handler


def _ready(service: Service, scope: Scope) -> tuple[int, Any]:
    del scope
    ready = service.repository.current is not None and not service.draining
    return (200 if ready else 503), {"ready": ready}


def _model_ready(service: Service, scope: Scope) -> tuple[int, Any]:
    return 200, {"name": service.named(scope).signature.name, "ready": True}


def _server(service: Service, scope: Scope) -> tuple[int, Any]:
    del scope
    version = service.servable().version.manifest["versions"].get("dlrm_jax") or "unknown"
    return 200, {"name": _SERVER, "version": version, "extensions": ["binary_tensor_data"]}


def _status(service: Service, scope: Scope) -> tuple[int, Any]:
    del scope
    return 200, {
        "ready": service.repository.current is not None and not service.draining,
        "uptime_seconds": round(time.time() - service.telemetry.started, 1),
        "model": describe(service.servable()),
        "example": page.example_row(service.servable()),
        "recent": service.telemetry.recently(),
        "queued_rows": service.batcher.queued_rows,
        "freshness_seconds": service.telemetry.freshness,
        "refused": {str(number): why for number, why in service.repository.refused.items()},
    }


async def _metrics(service: Service, scope: Scope, receive: Receive, send: Send) -> int:
    del scope, receive
    await send_whole(send, 200, service.telemetry.exposition(), b"text/plain; version=0.0.4; charset=utf-8")
    return 200


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    allowed = getattr(error, "headers", None)
    text = "no such path; /openapi.json lists them" if status == 404 else "method not allowed"
    return Response(orjson.dumps({"error": text}), status, allowed, "application/json")


def make_app(service: Service, start: Callable[[], None], token: str = "") -> ASGIApp:
    """The application. `start` is called in its event loop; `token`, if not empty, is asked of every request."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        del app
        service.batcher.start()
        start()
        yield {REFUSE: refuse}
        await service.repository.stop()
        await service.batcher.stop()

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        return Route(path, _Endpoint(service, handler), methods=[method])

    async def index(request: Request) -> Response:
        del request
        return HTMLResponse(page.PAGE, headers=page.SECURITY_HEADERS)

    api = describe_api()
    model = "/v2/models/{name}"
    routes = [
        route(f"{model}/infer", _infer, "POST"),
        route("/v1/score", _score, "POST"),
        route(f"{model}/versions/{{version}}/infer", _infer, "POST"),
        route("/v2/health/live", _json_get(lambda service, scope: (200, {"live": True}))),
        route("/v2/health/ready", _json_get(_ready)),
        route("/v2", _json_get(_server)),
        route(f"{model}/ready", _json_get(_model_ready)),
        route(f"{model}/versions/{{version}}/ready", _json_get(_model_ready)),
        route(model, _json_get(lambda service, scope: (200, model_metadata(service.named(scope))))),
        route(
            f"{model}/versions/{{version}}",
            _json_get(lambda service, scope: (200, model_metadata(service.named(scope)))),
        ),
        route("/metrics", _metrics),
        route("/status.json", _json_get(_status)),
        route("/openapi.json", _json_get(lambda service, scope: (200, api))),
        Route("/", index),
    ]
    starlette = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: _not_found, 405: _not_found})
    app = Shortcut(starlette, _Endpoint(service, _score), _Endpoint(service, _infer))
    guard = Guard(app, token) if token else None

    def refuse(method: bytes, path: bytes, headers: list[tuple[bytes, bytes]], client: Any) -> Refusal | None:
        # Who has no token hears of that, and takes nobody's place.
        return service.refusal(method, path, client) if guard is None or guard.allows(headers) else None

    return guard or app
