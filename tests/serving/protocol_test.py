"""What a connection does with bytes and with time: refusals by the head alone, bounds, phases and their deadlines."""

import asyncio
import time

import pytest
import uvicorn
from uvicorn.server import ServerState

from dlrm_jax.serving.http.app import REFUSE, Refusal
from dlrm_jax.serving.http.connection import Bounds, Connection, end_overdue

REQUEST = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written, self.closed = b"", ""

    def write(self, data):
        if not self.closed:
            self.written += data

    def is_closing(self):
        return bool(self.closed)

    def close(self):
        self.closed = self.closed or "closed"

    def abort(self):
        self.closed = "aborted"

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


BOUNDS = {"idle": 1000.0, "head": 2000.0, "body": 4000.0, "answer": 8000.0}


def phase(protocol):
    """Which phase's deadline a connection has."""
    return min(BOUNDS, key=lambda name: abs(protocol.until - time.monotonic() - BOUNDS[name]))


async def settled():
    for _ in range(50):
        await asyncio.sleep(0)


def with_connections(work, count=1, **bounds):
    """`work` on connected protocols and the list of heads that they asked about; /slow is never answered."""

    async def application(scope, receive, send):
        if scope["path"] == "/slow":
            await asyncio.sleep(1000)
        if scope["path"] == "/read":
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body")
            assert b"authorization" not in dict(scope["headers"])
            asked.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    asked = []

    async def main():
        def refuse(method, path, headers, client):
            asked.append((method, path))
            return Refusal(429, b"{}", ((b"retry-after", b"1"),)) if path == b"/v1/score" else None

        config = uvicorn.Config(application, http=Connection, lifespan="off", log_config=None)
        config.load()
        state, shared, made = ServerState(), Bounds(**BOUNDS | bounds), []
        for _ in range(count):
            protocol, transport = Connection(shared, config, state, {REFUSE: refuse}), Transport()
            protocol.connection_made(transport)
            made.append((protocol, transport))
        await work(*made, asked)
        for task in state.tasks:
            task.cancel()

    asyncio.run(main())


def with_protocol(work):
    """`work` on a protocol that is connected, its transport, and the list of heads that it asked about."""

    async def on_one(one, asked):
        await work(*one, asked)

    with_connections(on_one)


def test_refusals_in_one_segment_leave_a_connection_that_is_idle():
    async def work(protocol, transport, asked):
        protocol.data_received(2 * REQUEST)
        assert transport.written.count(b"HTTP/1.1 429 Too Many Requests\r\n") == 2 and not transport.closed
        assert asked == 2 * [(b"POST", b"/v1/score")] and phase(protocol) == "idle"

    with_protocol(work)


GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
HUGE = b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"
CHUNKED = b"POST /nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "then", "phases"),
    [
        (b"", b"\r\n", ["head", "head"]),
        (GET, b"\r\n", ["idle", "idle"]),
        (GET, b"G", ["idle", "head"]),
        (b"GET / HT", b"T", ["head", "head"]),
        (HUGE, b"x", ["body", "body"]),
        (CHUNKED, b"1\r\nx\r\n", ["body", "body"]),
        (CHUNKED, b"0\r\n\r\n", ["body", "idle"]),
        (REQUEST[:-1], b"", ["body", "body"]),
        (REQUEST[:-1], b"}", ["body", "idle"]),
        (GET.replace(b"/", b"/slow", 1), b"\r\n", ["answer", "answer"]),
    ],
)
def test_each_phase_has_one_deadline_whatever_arrives(first, then, phases):
    async def work(protocol, transport, asked):
        for data, want in zip((first, then), phases, strict=True):
            protocol.data_received(data)
            await settled()
            assert phase(protocol) == want
        before = protocol.until
        if phases[0] == phases[1] != "idle":
            protocol.data_received(b"\r\n" if then == b"\r\n" else b"")
            assert protocol.until == before
        protocol.until = time.monotonic() - 1
        end_overdue([protocol])
        assert transport.closed == "aborted"

    with_protocol(work)


def test_who_does_not_read_answers_has_a_deadline_too():
    async def work(protocol, transport, asked):
        protocol.pause_writing()
        protocol.data_received(GET)
        await settled()
        assert phase(protocol) == "answer" and not transport.written
        protocol.resume_writing()
        await settled()
        assert phase(protocol) == "idle" and transport.written

    with_protocol(work)


def test_requests_that_wait_for_an_answer_are_few():
    async def work(protocol, transport, asked):
        protocol.data_received(16 * GET)
        await settled()
        assert transport.written.count(b" 200 OK") == 16 and not transport.closed and phase(protocol) == "idle"
        protocol.data_received(3000 * GET)
        assert transport.closed == "aborted" and len(protocol.pipeline) <= 16

    with_protocol(work)


LINES = b"".join(b"x%d: y\r\n" % i for i in range(10_000))
WIDE = b"x: %s\r\n" % (b"y" * 70_000)


@pytest.mark.parametrize(
    ("sent", "ends"),
    [
        ([GET[:-2] + WIDE + b"\r\n"], b"431"),
        ([GET[:-2] + LINES + b"\r\n"], b"431"),
        ([GET[:-2] + b"x: ", *[b"y" * 1000] * 100], b"431"),
        ([b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n"], b"431"),
        ([GET, *[b"\r\n" * 500] * 100], b"431"),
        ([b"NONSENSE\r\n\r\n"], b"400"),
        ([CHUNKED + b"1\r\nx\r\n" * 2000], b"400"),
        ([CHUNKED + b"0\r\n" + b"x: y\r\n" * 2000], b"400"),
        ([CHUNKED.replace(b"nothing", b"slow") + b"0\r\n", *[b"a: %s\r\n" % (b"y" * 1000)] * 100], b"431"),
    ],
)
def test_what_is_no_body_is_bounded_in_bytes(sent, ends):
    async def work(protocol, transport, asked):
        for data in sent:
            if not transport.closed:
                protocol.data_received(data)
                await settled()
        assert transport.closed == "closed"
        assert transport.written.rpartition(b"HTTP/1.1 ")[2].startswith(ends) and len(protocol.headers) <= 101

    with_protocol(work)


def test_a_body_that_nobody_reads_is_not_kept():
    """As of who has no token: the answer comes first, and what still comes is dropped."""

    async def work(protocol, transport, asked):
        protocol.data_received(CHUNKED)
        await settled()
        assert b" 200 OK" in transport.written
        for _ in range(100):
            protocol.data_received(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            assert not protocol.cycle.body
        assert phase(protocol) == "body" and not transport.closed

    with_protocol(work)


def test_trailers_become_nobodys_headers():
    async def work(protocol, transport, asked):
        protocol.data_received(CHUNKED.replace(b"nothing", b"read") + b"0\r\nauthorization: mine\r\n\r\n" + GET)
        await settled()
        assert transport.written.count(b" 200 OK") == 2

    with_protocol(work)


@pytest.mark.parametrize("cut", [0, 5, 40])
def test_a_wish_to_upgrade_is_ignored_and_the_body_is_no_request(cut):
    inner = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
    head = b"POST /read HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"

    async def work(protocol, transport, asked):
        whole = head + b"content-length: %d\r\n\r\n" % len(inner) + inner + GET
        border = len(whole) - len(GET) - len(inner) + cut
        for data in (whole[:border], whole[border:]):
            protocol.data_received(data)
            await settled()
        assert asked[:2] == [(b"POST", b"/read"), inner] and (b"GET", b"/smuggled") not in asked
        assert transport.written.count(b" 200 OK") == 2
        protocol.data_received(head + b"\r\n")
        await settled()
        assert asked[-2:] == [(b"POST", b"/read"), b""] and phase(protocol) == "idle"

    with_protocol(work)


def test_who_sends_no_more_is_answered():
    async def work(protocol, transport, asked):
        protocol.data_received(GET)
        assert protocol.eof_received() is True
        await settled()
        assert b"connection: close" in transport.written and transport.closed == "closed"

    with_protocol(work)

    async def half(protocol, transport, asked):
        protocol.data_received(CHUNKED)
        assert not protocol.eof_received()

    with_protocol(half)


def test_what_follows_a_request_and_is_none_waits_for_its_answer():
    async def work(protocol, transport, asked):
        protocol.data_received(GET + b"NONSENSE\r\n\r\n")
        await settled()
        assert transport.written.count(b"HTTP/1.1 ") == 1 and b" 200 OK" in transport.written and transport.closed

    with_protocol(work)


def test_at_the_bound_who_is_idle_the_longest_makes_room():
    async def idle(first, second, third, asked):
        assert first[1].closed == "aborted" and not second[1].closed and not third[1].closed
        assert first[0] not in first[0].server_state.connections

    async def busy(first, asked):
        protocol, transport = first
        protocol.data_received(GET[:-2])
        late, other = (
            Connection(protocol._bounds, protocol.config, protocol.server_state, protocol.app_state),
            Transport(),
        )
        late.connection_made(other)
        assert other.written.startswith(b"HTTP/1.1 503 ") and other.closed == "closed" and not transport.closed
        late.connection_lost(None)
        assert protocol.server_state.connections == {protocol} and not protocol._bounds.idlers

    with_connections(idle, count=3, max_connections=2)
    with_connections(busy, max_connections=1)


def test_at_the_end_each_connection_closes_with_its_answer():
    async def work(protocol, transport, asked):
        protocol._bounds.draining = True
        protocol.data_received(GET)
        await settled()
        assert b" 200 OK" in transport.written and b"connection: close" in transport.written and transport.closed

    with_protocol(work)


@pytest.mark.parametrize("busy", ["paused", "expects", "in turn"])
def test_what_uvicorn_has_to_bound_is_left_to_it(busy):
    async def work(protocol, transport, asked):
        request = REQUEST
        if busy == "paused":  # The client does not read its answers.
            protocol.pause_writing()
        if busy == "expects":
            request = request.replace(b"host: x", b"expect: 100-continue")
        if busy == "in turn":  # An answer is under way: another before it would be taken for it.
            protocol.data_received(GET.replace(b"/", b"/slow", 1))
            asked.clear()
        protocol.data_received(request)
        assert asked == [] and b"429" not in transport.written

    with_protocol(work)
