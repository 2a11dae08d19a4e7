"""One client's connection: uvicorn's protocol, bounded in bytes and in time, whatever the client sends or leaves.

Every connection is in one phase (idle, head, body, answer), each with a deadline that only its own end moves. The
server looks at the deadlines ten times a second (`end_overdue`), so that a phase costs a number and no timer.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dlrm_jax.serving.http.app import ARRIVED, REFUSE, Refusal
from dlrm_jax.serving.http.asgi import JSON

_MAX_HEAD_BYTES = 64 << 10
_MAX_HEADERS = 100
_MAX_PIECES = 1000
"""Trailers and chunks of a body in what is read at once, up to 256 kB: each takes a callback's time."""
_MAX_ENDED = 100
"""Connections that are ended at once, that nobody waits for long meanwhile."""
_MAX_PIPELINED = 16
"""Requests that may wait for the answer to an earlier one of their connection."""


@dataclasses.dataclass
class Bounds:
    """What the connections of a server share: seconds of each phase, and who is there."""

    max_connections: int = 2000
    idle: float = 30.0
    head: float = 10.0
    body: float = 11.0
    answer: float = 11.0
    """Until all of it is handed to the network, or the client has not read what came before."""
    draining: bool = False
    """The server ends: each connection closes with its next answer."""
    idlers: dict["Connection", None] = dataclasses.field(default_factory=dict)
    """Who is idle, the longest first."""


def end_overdue(connections: Iterable[Any]) -> None:
    """End the connections whose phase took too long, a hundred at most; the next call goes on."""
    now = time.monotonic()
    overdue = (connection for connection in connections if connection.until < now)
    for connection in list(itertools.islice(overdue, _MAX_ENDED)):
        connection.leave()
        connection.transport.abort()


class _Unfit(Exception):
    """What a client sent is refused: a status and why."""


class Connection(HttpToolsProtocol):
    """Refuses by the head alone, too: in an overload that is what most requests get.

    Such a refusal is written here, without a task and past the application: what it costs is taken from those that are
    served.
    """

    def __init__(self, bounds: Bounds, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._bounds = bounds
        self.until = math.inf
        """When this phase must be over, in seconds of time.monotonic()."""
        self._unread = self._pieces = 0
        """Bytes since the last that belonged to a body, and callbacks for what was read last."""
        self._in_head = self._in_message = self._refused = self._is_copy = False

    def connection_made(self, transport: Any) -> None:
        """A client is there; at the bound it takes the place of who was idle the longest, or is sent away."""
        super().connection_made(transport)
        full = len(self.connections) > self._bounds.max_connections
        self._await_request(self._bounds.head)
        if not full:
            return
        oldest = next(iter(self._bounds.idlers))
        if oldest is self:
            self._end(503, "too many connections")
        else:
            oldest.leave()
            oldest.transport.abort()

    def leave(self) -> None:
        """Be counted no more."""
        self.connections.discard(self)
        self._bounds.idlers.pop(self, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self.leave()
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:
        """The client sends no more; a whole request of it is answered all the same."""
        if self._in_message or not self._answers() or self.scheme == "https":  # TLS knows no half-closed connection.
            return None
        self.cycle.keep_alive = False
        return True

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        self._unread += len(data)
        self._pieces = 0
        try:
            self._feed(data)
            if self._unread > _MAX_HEAD_BYTES:
                raise _Unfit(431, "headers are too long")
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse_connection(*(cause.args if isinstance(cause, _Unfit) else (400, "this is not HTTP")))
        except _Unfit as unfit:
            self._refuse_connection(*unfit.args)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                data = data[stopped.args[0] :]
                self._ignore_upgrade()

    def _ignore_upgrade(self) -> None:
        """httptools takes what follows a wish to upgrade for another protocol: a new parser reads it as the body."""
        framing = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        framing += [] if self._keeps() else [(b"connection", b"close")]
        self.parser, self._is_copy = httptools.HttpRequestParser(self), True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(b"%s: %s\r\n" % pair for pair in framing))

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._is_copy:
            return
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise _Unfit(429, "too many requests before the first is answered")
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._wait(self._bounds.head)

    def on_url(self, url: bytes) -> None:
        """Some of its target."""
        if not self._is_copy:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers; trailers are dropped."""
        if not self._in_head:
            self._count_piece()
        elif not self._is_copy:
            super().on_header(name, value)
            if len(self.headers) > _MAX_HEADERS:
                raise _Unfit(431, f"more than {_MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        if self._is_copy:
            self._is_copy = False
            return
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > _MAX_HEAD_BYTES:
            raise _Unfit(431, "headers are too long")
        self._in_head, self._unread = False, 0
        self._wait(self._bounds.body)
        refusal = self._refusal()
        self._refused = refusal is not None
        if refusal is not None:
            self._write(refusal, self._keeps())
            return
        super().on_headers_complete()
        self.cycle.keep_alive &= not self._bounds.draining
        self.scope["state"][ARRIVED] = time.monotonic()

    def on_body(self, body: bytes) -> None:
        """Some of its body; nobody reads it if it is refused."""
        self._unread = 0
        self._count_piece()
        if not self._refused:
            super().on_body(body)

    def _count_piece(self) -> None:
        self._pieces += 1
        if self._pieces > _MAX_PIECES:
            raise _Unfit(400, "the body comes in too small chunks, or has too many trailers")

    def on_message_complete(self) -> None:
        """All of it is there; if it is answered already, the next may come."""
        if self.parser.should_upgrade():
            return  # Its body follows.
        self._in_message, self._unread = False, 0
        if not self._refused:
            super().on_message_complete()
            self._next()
        elif self._keeps():
            self._await_request(self._bounds.idle)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """An answer is written."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # uvicorn's own timer, which every byte would stop.
        self._next()

    def _next(self) -> None:
        """The phase after a request came, or was answered."""
        if self._in_message:
            return  # Answered before its end came, which has its deadline.
        if self._answers():
            self._wait(self._bounds.answer)
        else:
            self._await_request(self._bounds.idle)

    def _answers(self) -> bool:
        """Whether there is a request that is not yet answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_request(self, seconds: float) -> None:
        self._bounds.idlers[self] = None
        self.until = time.monotonic() + seconds

    def _wait(self, seconds: float) -> None:
        self._bounds.idlers.pop(self, None)
        # An earlier request that is not yet answered has its own time.
        earlier = self.pipeline or (self._in_message and self._answers())
        self.until = time.monotonic() + seconds + (self._bounds.answer if earlier else 0.0)

    def _refusal(self) -> Refusal | None:
        """Asks the application, unless uvicorn has to see to it: answers are under way, or the client does not read."""
        if self._answers() or self.expect_100_continue or self.flow.write_paused or self.transport.is_closing():
            return None
        refuse: Callable[..., Refusal | None] = self.app_state[REFUSE]
        return refuse(self.parser.get_method(), self.url, self.headers, self.client)

    def _refuse_connection(self, status: int, text: str) -> None:
        """No more can be read. What was asked before is answered first."""
        if self.transport.is_closing():
            return
        if self.pipeline or (self._answers() and self.cycle.response_started):
            self.transport.abort()  # An answer now would be taken for another's.
        elif self._answers() and not self.cycle.more_body:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        else:
            self._end(status, text)

    def _end(self, status: int, text: str) -> None:
        self._write(Refusal(status, b'{"error":"%s"}' % text.encode(), ()), keeps=False)
        self.transport.close()

    def _write(self, refusal: Refusal, keeps: bool) -> None:
        status, body, more = refusal
        headers = [*self.server_state.default_headers, (b"content-type", JSON), *more]
        headers += [] if keeps else [(b"connection", b"close")]
        lines = [STATUS_LINE[status], *(b"%s: %s\r\n" % pair for pair in headers)]
        self.transport.write(b"".join([*lines, b"content-length: %d\r\n\r\n" % len(body), body]))

    def _keeps(self) -> bool:
        """Whether another request may follow on this connection."""
        return not self._bounds.draining and self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
