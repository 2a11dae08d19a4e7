"""What every request passes before it reaches its handler: the token, and past the router where that would cost."""

import base64
import contextlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from dlrm_jax.serving.http.asgi import JSON, send_whole

OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
"""What an orchestrator may ask without the token."""


class Guard:
    """Lets only requests with the bearer token in, but for health."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or the lifespan."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self.allows(scope["headers"]):
            challenge = (b"www-authenticate", b'Bearer, Basic realm="dlrm_jax"')
            await send_whole(send, 401, b'{"error":"a bearer token is needed"}', JSON, challenge)
            return
        await self._app(scope, receive, send)

    def allows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether the token is among them."""
        given = dict(headers).get(b"authorization", b"")
        kind, _, rest = given.partition(b" ")
        if kind.lower() == b"basic":  # What a browser sends for the page, the token as password.
            with contextlib.suppress(ValueError):
                rest = base64.b64decode(rest, validate=True).partition(b":")[2]
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(rest.strip(), self._token)


class Shortcut:
    """Takes the paths that are asked thousands of times a second past the router, which costs as much as a refusal."""

    def __init__(self, app: ASGIApp, score: ASGIApp, infer: ASGIApp) -> None:
        self._app, self._score, self._infer = app, score, infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or the lifespan."""
        if scope["type"] == "http" and scope["method"] == "POST":
            if scope["path"] == "/v1/score":
                return await self._score(scope, receive, send)
            match scope["path"].split("/"):
                case ["", "v2", "models", name, "infer"]:
                    scope["path_params"] = {"name": name}
                    return await self._infer(scope, receive, send)
        await self._app(scope, receive, send)
