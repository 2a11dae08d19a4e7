"""Hostile clients on loopback: none may end, stall, fill or hold the server, or pass for another client."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dlrm_jax.serving.artifact.errors import BadRequest, Busy, TooLate
from dlrm_jax.serving.artifact.raw_values import MAX_TEXT
from dlrm_jax.serving.http.app import Service
from dlrm_jax.serving.http.asgi import Held, Limits
from dlrm_jax.serving.http.protocol import _quotes_of_texts, parse_json, wanted_outputs
from dlrm_jax.serving.http.telemetry import Telemetry, Unhindered
from tests.helpers import tiny_model
from tests.server_process import RunningServer, running
from tests.serving.bounds_test import certificate  # noqa: F401
from tests.serving.transform_test import prepared, without_label  # noqa: F401
from tests.serving_helpers import export_tiny

pytestmark = pytest.mark.end_to_end

CONNECTIONS = 40
FLAGS = (
    "--batch_sizes=1,8",
    "--body_seconds=1",
    "--request_seconds=20",
    f"--max_connections={CONNECTIONS}",
    f"--max_body_bytes={16 << 20}",
)
HEAD = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def attacked(prepared):  # noqa: F811
    """(server, a valid row)."""
    rows, _, model_dir, *_ = prepared
    with running(model_dir, *FLAGS) as server:
        yield server, without_label(rows)[0]
        assert server.process.poll() is None, "the server died"


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def request_of(value: object) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body)


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            data += part
    return data


def serves(server: RunningServer, row: dict) -> bool:
    try:
        return server.ask("POST", "/v1/score", {"rows": [row]})[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_large_requests_are_refused_before_the_work(attacked):
    server, row = attacked
    numbers = {"name": "dense", "shape": [1, 6], "datatype": "FP32", "data": [0] * 6}
    ids = {"name": "ids", "shape": [1, 14], "datatype": "INT32", "data": [0] * 14}
    for path, value, words in (
        ("/v1/score", {"rows": [row | {"history": ["abcd"] * 1_500_000}]}, "values; at most"),
        ("/v1/score", {"rows": [row | {"history": "b|" * 5_000_000}]}, "has a value of 10000000 bytes"),
        ("/v1/score", {"rows": [row | {"colour": "u" * 10_000_000}]}, "has a value of 10000000 bytes"),
        ("/v1/score", b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", "values; at most"),
        ("/v1/score", b'{"rows":' + b"[" * 1000 + b"]" * 1000 + b"}", "row 0 is ["),
        (
            "/v2/models/log/infer",
            {"inputs": [numbers, ids], "outputs": [{"name": "logit"}] * 2000},
            "'logit' is asked for twice",
        ),
    ):
        headers = {"content-type": "application/json"} if isinstance(value, bytes) else None
        status, _, answer = server.ask("POST", path, value, headers)
        assert status == 400 and words in answer["error"] and len(answer["error"]) < 300
    header = {"inference-header-content-length": "0" * 20 + "9" * 5000}
    assert server.ask("POST", "/v2/models/log/infer", {}, header)[0] == 400


def test_endless_trailers_end_at_a_bound(attacked):
    server, row = attacked
    trailer = b"x: " + b"y" * 60_000 + b"\r\n"
    with connect(server) as connection, pytest.raises(ConnectionError):
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n")
        for _ in range(1000):  # 60 MB; what the network holds of it is a few.
            connection.sendall(trailer)
    assert serves(server, row)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n\r\n", id="served, then an empty line"),
        pytest.param(HEAD + b"content-length: 99999999\r\n\r\nx", id="413 and one byte"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\nx", id="GET with a body"),
        pytest.param(b"POST /no HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", id="404 with chunks"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 3000, id="many, unread"),
        pytest.param(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 10, id="some, unread"),
    ],
)
def test_connections_that_are_held_do_not_keep_others_out(attacked, sent):
    server, row = attacked
    with contextlib.ExitStack() as held:
        for _ in range(CONNECTIONS + 5):
            connection = held.enter_context(connect(server))
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
        until = time.monotonic() + 20
        while not serves(server, row):
            assert time.monotonic() < until, "nobody else is served"
            time.sleep(0.05)


def test_a_wish_to_upgrade_does_not_make_a_body_a_request(attacked):
    server, row = attacked
    inner = json.dumps({"rows": [row]}).encode()
    upgrade = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    with connect(server) as connection:
        connection.sendall(HEAD + upgrade + b"content-length: %d\r\n\r\n" % len(inner))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(inner)
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answers = everything(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 2 and b'"probability"' in answers and b'{"live":true}' in answers


def test_who_sends_no_more_gets_an_answer(attacked):
    server, row = attacked
    with connect(server) as connection:
        # Corked, the end goes out with the request: it is there before an answer can be.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        connection.sendall(request_of({"rows": [row]}))
        connection.shutdown(socket.SHUT_WR)
        answer = everything(connection)
    assert b'"probability"' in answer and b"connection: close" in answer


@pytest.fixture
def tiny(tmp_path):
    export_tiny(tmp_path / "model", tiny_model())
    return tmp_path / "model"


ROW = {"x0": 1, "x1": 2.5, "x2": -3, "user": 10, "item": 6, "history": [1, 2], "flag": None}


def test_idle_connections_a_lost_directory_and_a_stalled_log_do_not_end_it(tiny):
    flags = ("--batch_sizes=1", "--access_log", "--poll_seconds=0.1", "--max_connections=5000")
    with running(tiny, *flags, open_files=200) as server, contextlib.ExitStack() as held:
        assert server.event("fewer_connections")["max_connections"] == 136
        server.reads.clear()
        for _ in range(300):
            held.enter_context(connect(server))
        tiny.rename(tiny.with_name("away"))
        for _ in range(600):
            assert serves(server, ROW)
        tiny.with_name("away").rename(tiny)
        server.reads.set()
        assert server.event("request", status=200)
        assert server.stop() == 0
    assert json.loads(server.lines[-1])["event"] == "stopped"


def test_idle_handshakes_do_not_end_it(tiny, certificate):  # noqa: F811
    flags = (f"--tls_cert={certificate}/cert.pem", f"--tls_key={certificate}/key.pem", "--batch_sizes=1")
    with running(tiny, *flags, "--poll_seconds=0.1", open_files=120) as server, contextlib.ExitStack() as held:
        for _ in range(300):
            held.enter_context(connect(server))
        server.event("look_failed")
        held.close()
        shutil.copytree(tiny / "1", tiny / "7")
        assert server.event("model_ready", version=7)


def test_the_end_comes_while_a_version_is_compiled(tiny):
    endless = ",".join(map(str, range(1, 3000)))
    with running(tiny, f"--batch_sizes={endless}", ready=False) as server:
        assert server.stop() == 0
    events = [json.loads(line)["event"] for line in server.lines]
    assert events[-1] == "stopped" and "model_ready" not in events


def test_connections_that_are_kept_are_answered_once_more_at_the_end(tiny):
    body = json.dumps({"rows": [ROW]})
    headers = {"content-type": "application/json"}
    with running(tiny, "--batch_sizes=1") as server, contextlib.ExitStack() as kept:
        connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for _ in range(3)]
        for connection in connections:
            kept.callback(connection.close)
            connection.request("GET", "/v2/health/ready")
            assert connection.getresponse().read() == b'{"ready":true}'
        server.process.send_signal(signal.SIGTERM)
        server.event("stopping")
        for connection in connections[:2]:
            connection.request("POST", "/v1/score", body, headers)
        connections[2].request("GET", "/v2/health/ready")
        scored = [connection.getresponse() for connection in connections[:2]]
        assert [(answer.status, answer.headers["connection"]) for answer in scored] == 2 * [(200, "close")]
        assert connections[2].getresponse().status == 503
        assert server.process.wait(30) == 0


def test_what_bodies_hold_together_is_bounded():
    held = Held(Limits(max_body_bytes=1 << 20))
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(held.one_body())(1 << 20)
        last = stack.enter_context(held.one_body())
        last(64 << 10)
        with pytest.raises(Busy, match="holds"):
            last(4 << 20)
    for _ in range(3):
        with held.one_body() as holds:
            holds(1 << 20)


def test_values_are_counted_before_they_are_made(monkeypatch):
    monkeypatch.setattr("dlrm_jax.serving.http.protocol.orjson", None)
    with pytest.raises(BadRequest, match="about 101 values; at most 50"):
        parse_json(b"[" * 101, 50)


def test_a_text_that_no_field_may_have_is_refused_before_it_is_made(monkeypatch):
    texts = ["é" * MAX_TEXT, "😀" * MAX_TEXT, "u" * MAX_TEXT, '"' * MAX_TEXT, "\\" * MAX_TEXT]
    for rows in ([dict(zip("abcde", texts, strict=True))] * 3, [{"a": [0] * 300_000}]):
        assert parse_json(json.dumps({"rows": rows}).encode(), 10**6, of_rows=True) == {"rows": rows}
    monkeypatch.setattr("dlrm_jax.serving.http.protocol.orjson", None)
    for where, body in (
        ("feature 'a'", b'{"rows":[{"b": "x", "a": "%s"}]}'),
        ("feature 'a'", b'{"rows":[{"b": "x\\"", "a":[ "%s", "b"]}]}'),
        ("feature 'a'", b'{"rows":[{"b": "x\\\\", "a":"%s'),
        ("the body", b'"%s'),
    ):
        for text in (b"u" * 800_000, b" :" * 400_000, b'u\\"' * 300_000, b"u\\\\" * 300_000):
            with pytest.raises(
                BadRequest, match=rf"^{where} has a value of {len(text)} bytes; a text has at most 6553"
            ):
                parse_json(body % text, 10**6, of_rows=True)


@hypothesis.given(st.lists(st.text('"\\\\u,:[]{} é😀')), st.booleans())
def test_texts_begin_and_end_where_the_parser_has_them(texts, as_ascii):
    body = json.dumps(texts, ensure_ascii=as_ascii).encode()
    quotes = _quotes_of_texts(np.frombuffer(body, np.uint8))
    pairs = zip(quotes[::2], quotes[1::2], strict=True)
    assert [json.loads(body[start : end + 1]) for start, end in pairs] == texts


def test_each_output_is_asked_for_once():
    with pytest.raises(BadRequest, match="twice"):
        wanted_outputs({"outputs": [{"name": "logit"}] * 2})


def test_long_work_leaves_the_event_loop_and_ends_at_its_deadline():
    """The first of three is still at work when its time is over; the second never begins; the third is served."""
    service = Service(None, None, Telemetry(), Limits())
    go_on, began = threading.Event(), []

    def parse(name):
        began.append((name, threading.current_thread() is threading.main_thread()))
        if name == "first":
            go_on.wait(30)
        return name

    async def main():
        assert await service.parsed(10, 0.0, lambda: parse("short")) == "short"
        late = [service.parsed(10**6, time.monotonic() + 0.1, lambda name=name: parse(name)) for name in ("first", "x")]
        answers = await asyncio.gather(*late, return_exceptions=True)
        assert [type(answer) for answer in answers] == [TooLate, TooLate]
        go_on.set()
        assert await service.parsed(10**6, time.monotonic() + 30, lambda: parse("third")) == "third"

    asyncio.run(main())
    assert began == [("short", True), ("first", False), ("third", False)]


def test_who_asks_again_and_again_for_the_summary_of_requests_costs_little(monkeypatch):
    telemetry = Telemetry()
    telemetry.scored(8, 0.001)
    first = telemetry.recently()
    telemetry.scored(8, 0.001)
    assert telemetry.recently() is first and first["rows_per_second"] == 0.8
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1)
    assert telemetry.recently()["rows_per_second"] == 1.6


def test_a_log_that_nobody_reads_keeps_nobody_waiting():
    reading, writing = os.pipe()
    handler = Unhindered(writing)
    record = logging.makeLogRecord({"msg": "x" * 1000})
    for _ in range(20_000):  # Twice what may wait; a pipe takes 64 kB.
        handler.emit(record)
    lines, data = [], b""
    while "lines_dropped" not in lines:
        data += os.read(reading, 1 << 16)
        *whole, data = data.split(b"\n")
        lines += [json.loads(line)["event"] for line in whole]
    assert len(lines) < 12_000
    handler.flush()
    os.close(reading)
    os.close(writing)
