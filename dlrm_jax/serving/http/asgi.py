"""Reading a request's body and answering it, on bare ASGI: bounded in size and time, every refusal with its status."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from dlrm_jax.serving.artifact.errors import Busy, shown

JSON = b"application/json"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a request."""

    max_body_bytes: int = 4 << 20
    max_rows: int = 4096
    request_seconds: float = 1.0
    body_seconds: float = 10.0


_SMALL = 64 << 10
"""Bytes of a body that count for nothing: of so many a connection holds as many before anybody reads them."""
_BODIES = 32
"""So many of the largest bodies may be held at once."""


class Held:
    """Bytes of bodies that a server holds for all its clients together."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._held = _BODIES * limits.max_body_bytes, 0

    @contextlib.contextmanager
    def one_body(self) -> Iterator[Callable[[int], None]]:
        """Within it, one request may say how many bytes of its body it holds by now; Busy if all hold too many."""
        own = 0

        def holds(count: int) -> None:
            nonlocal own
            more = max(0, count - _SMALL) - own
            if self._held + more > self._most:
                raise Busy(f"the server holds {self._held} bytes of others' requests", 1.0)
            self._held, own = self._held + more, own + more

        try:
            yield holds
        finally:
            self._held -= own


class HttpError(Exception):
    """A refusal with a status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_body(scope: Scope, receive: Receive, limits: Limits, holds: Callable[[int], None]) -> bytes:
    """The request's body; HttpError for one that is too large, too slow, encoded or cut off. See Held for `holds`."""
    headers = Headers(scope=scope)
    if headers.get("content-encoding", "identity") != "identity":
        raise HttpError(415, f"Content-Encoding is {shown(headers['content-encoding'])}; send the body as it is")
    length = headers.get("content-length")
    if length is not None and length.isdecimal() and int(length) > limits.max_body_bytes:
        raise HttpError(413, f"the body has {length} bytes; at most {limits.max_body_bytes}")
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        return message["body"]  # Mostly it comes whole.
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _gather(message, receive, limits, holds)
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {limits.body_seconds:g} s") from None


async def _gather(message: Any, receive: Receive, limits: Limits, holds: Callable[[int], None]) -> bytes:
    body = bytearray()
    while True:
        if message["type"] == "http.disconnect":
            raise HttpError(400, "the connection ended before the body did")
        body += message.get("body", b"")
        if len(body) > limits.max_body_bytes:
            raise HttpError(413, f"the body has more than {limits.max_body_bytes} bytes")
        holds(len(body))
        if not message.get("more_body"):
            return bytes(body)
        message = await receive()


async def send_whole(send: Send, status: int, body: bytes, kind: bytes = JSON, *more: tuple[bytes, bytes]) -> None:
    """Answer with a whole body; `more` are further headers."""
    length = str(len(body)).encode()
    headers = [(b"content-type", kind), (b"content-length", length), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def require_type(scope: Scope, allowed: tuple[str, ...]) -> None:
    """HttpError for a body that says to be of another type."""
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = value.split(b";")[0].strip().lower().decode("latin-1")
            if kind not in allowed:
                raise HttpError(415, f"Content-Type is {shown(kind)}; expected {' or '.join(allowed)}")
