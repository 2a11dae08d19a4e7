"""Who is let in, who is refused and how, and how a server ends: the token, TLS, the queue's bounds, flags."""

import concurrent.futures
import contextlib
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import time

import pytest

from tests.forked import run
from tests.helpers import tiny_model
from tests.server_process import running
from tests.serving_helpers import export_tiny

pytestmark = pytest.mark.end_to_end
ROW = {"x0": 1, "x1": 2.5, "x2": -3, "user": 10, "item": 6, "history": [1, 2], "flag": None}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    files = ["-keyout", directory / "key.pem", "-out", directory / "cert.pem"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return directory


def test_token_tls_a_full_queue_and_an_orderly_end(tmp_path, certificate):
    export_tiny(tmp_path / "model", tiny_model())
    (tmp_path / "token").write_text("sesame\n")
    flags = [f"--tls_cert={certificate}/cert.pem", f"--tls_key={certificate}/key.pem"]
    flags += [f"--token_file={tmp_path}/token", "--max_queued_rows=1", "--batch_sizes=1", "--max_delay_ms=1500"]
    with running(tmp_path / "model", *flags, "--request_seconds=5", "--batch_sizes=4") as server:
        trusted = ssl.create_default_context(cafile=str(certificate / "cert.pem"))

        def ask(path="/v1/score", token="sesame", rows=1):
            connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=30, context=trusted)
            with contextlib.closing(connection):
                headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
                body = json.dumps({"rows": [ROW] * rows}) if path == "/v1/score" else None
                connection.request("POST" if body else "GET", path, body, headers)
                response = connection.getresponse()
                return response.status, response.headers, json.loads(response.read() or b"null")

        assert ask(token="wrong")[0] == 401 and ask("/v2/health/live", token="wrong")[0] == 200
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            first = pool.submit(ask)
            time.sleep(0.5)  # It waits for company for a second more.
            status, headers, answer = ask()
            assert status == 429 and int(headers["retry-after"]) >= 1 and "at most 1" in answer["error"]
            assert ask(token="wrong")[0] == 401  # Not 429: who has no token learns nothing of the queue.
            server.process.send_signal(signal.SIGTERM)
            server.event("stopping")
            status, _, answer = first.result()
        assert status == 200 and len(answer["probability"]) == 1
        assert server.process.wait(30) == 0
        assert json.loads(server.lines[-1])["event"] == "stopped"


def test_who_is_refused_by_the_head_alone_may_ask_again_on_the_same_connection(tmp_path):
    export_tiny(tmp_path, tiny_model())
    body = json.dumps({"rows": [ROW]}).encode()
    head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body)
    flags = ("--max_queued_rows=1", "--batch_sizes=4", "--max_delay_ms=3000", "--request_seconds=9")

    def answers(connection, count=1):
        data = b""
        while data.count(b"\r\n\r\n") < count or not data.endswith(b"}"):
            data += connection.recv(4096)
        return data

    with running(tmp_path, *flags) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, "POST", "/v1/score", {"rows": [ROW]})
        time.sleep(0.5)  # It waits for company for seconds more, and is all that may wait.
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head + b"\r\n" + body[:7])
            refused = answers(connection).lower()
            connection.sendall(body[7:])
            assert refused.startswith(b"http/1.1 429 ") and b"retry-after: 1\r\n" in refused and b"at most 1" in refused
            connection.sendall(2 * (head + b"\r\n" + body))
            assert answers(connection, 2).count(b"HTTP/1.1 429 ") == 2
            for last in (
                head + b"connection: close\r\n\r\n",
                head.replace(b"1.1", b"1.0") + b"connection: keep-alive\r\n\r\n",
            ):
                with socket.create_connection(("127.0.0.1", server.port), timeout=20) as another:
                    another.sendall(last + body)
                    refused = answers(another)
                    assert refused.startswith(b"HTTP/1.1 429 ") and b"connection: close\r\n" in refused
                    assert another.recv(1) == b""
            assert not first.done() and first.result()[0] == 200
            connection.sendall(head + b"\r\n" + body)
            assert answers(connection).startswith(b"HTTP/1.1 200 ")
        metrics = server.ask("GET", "/metrics")[2].decode()
        assert 'dlrm_rejected_total{reason="busy"} 5.0' in metrics
        assert 'dlrm_stage_seconds_count{stage="accept"} 2.0' in metrics  # The other five never became a task.


def test_who_waited_too_long_is_refused_and_requests_are_logged(tmp_path):
    """A bound that no request can keep: each has waited for longer before the server comes to it."""
    export_tiny(tmp_path, tiny_model())
    with running(tmp_path, "--max_wait_ms=0.0001", "--access_log", "--batch_sizes=1") as server:
        status, headers, answer = server.ask("POST", "/v1/score", {"rows": [ROW]})
        assert status == 429 and int(headers["retry-after"]) >= 1 and "would wait" in answer["error"]
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        line = server.event("request", status=429)
        assert (line["method"], line["path"], line["client"]) == ("POST", "/v1/score", "127.0.0.1") and line["ms"] >= 0
        server.event("request", path="/v2/health/ready", status=200)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model={tmp}/no"], "holds no model version"),
        (["--model={tmp}", "--batch_sizes=1,x"], "--batch_sizes=1,x is not a list"),
        (["--model={tmp}", "--tls_cert=a"], "go together"),
        (["--model={tmp}", "--max_rows=0"], "--max_rows is 0"),
        (["--model={tmp}", "--max_wait_ms=0"], "--max_wait_ms is 0"),
        (["--model={tmp}", "--token_file={tmp}/no"], "does not exist"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(tmp_path, flags, words):
    finished = run("serve", *(flag.format(tmp=tmp_path) for flag in flags))
    assert finished.returncode == 1
    assert words in finished.stderr and "Traceback" not in finished.stderr
