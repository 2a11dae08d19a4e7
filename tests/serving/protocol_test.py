"""What the server's protocol does on the head of a request alone: when it asks, and what a refusal leaves behind."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from dlrm_jax.serving.http.app import REFUSE, Refusal
from dlrm_jax.serving.http.server import _Protocol

REQUEST = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written, self.closed = b"", False

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


def with_protocol(work, limit=None):
    """`work` on a protocol that is connected, its transport, and the list of heads that it asked about."""

    async def application(scope, receive, send):
        await asyncio.sleep(10)

    async def main():
        asked = []

        def refuse(method, path, headers, client):
            asked.append((method, path))
            return Refusal(429, b"{}", ((b"retry-after", b"1"),)) if method == b"POST" else None

        config = uvicorn.Config(application, http=_Protocol, limit_concurrency=limit, lifespan="off", log_config=None)
        config.load()
        protocol, transport = _Protocol(config, ServerState(), {REFUSE: refuse}), Transport()
        protocol.connection_made(transport)
        await work(protocol, transport, asked)
        for task in protocol.tasks:
            task.cancel()

    asyncio.run(main())


def test_refusals_in_one_segment_leave_one_timer_that_ends_the_connection():
    async def work(protocol, transport, asked):
        armed = []
        call_later = protocol.loop.call_later

        class Loop:
            def call_later(self, seconds, function, *arguments):
                armed.append(call_later(seconds, function, *arguments))
                return armed[-1]

        protocol.loop = Loop()
        protocol.data_received(2 * REQUEST)
        assert transport.written.count(b"HTTP/1.1 429 Too Many Requests\r\n") == 2 and not transport.closed
        assert asked == 2 * [(b"POST", b"/v1/score")]
        assert [timer for timer in armed if not timer.cancelled()] == [protocol.timeout_keep_alive_task]

    with_protocol(work)


@pytest.mark.parametrize("busy", ["paused", "full", "expects", "in turn"])
def test_what_uvicorn_has_to_bound_is_left_to_it(busy):
    async def work(protocol, transport, asked):
        request = REQUEST
        if busy == "paused":  # The client does not read its answers.
            protocol.pause_writing()
        if busy == "expects":
            request = request.replace(b"host: x", b"expect: 100-continue")
        if busy == "in turn":  # An answer is under way: another before it would be taken for it.
            protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            asked.clear()
        protocol.data_received(request)
        assert asked == [] and b"429" not in transport.written

    with_protocol(work, limit=1 if busy == "full" else None)


def test_a_body_that_does_not_come_ends_the_connection(monkeypatch):
    monkeypatch.setattr("dlrm_jax.serving.http.server._HEADER_SECONDS", 0.01)

    async def work(protocol, transport, asked):
        protocol.data_received(REQUEST[:-1])
        assert b"429" in transport.written and not transport.closed
        await asyncio.sleep(0.2)
        assert transport.closed

    with_protocol(work)
