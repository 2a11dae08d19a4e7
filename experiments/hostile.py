"""Hostile clients: connections that are idle or held, requests that would stall the server, requests by the thousand.

`python experiments/hostile.py HOST PORT NAME` opens 1,000 idle and 200 held connections and sends stalling requests,
one after the other, until its standard input ends; then it prints how many of each it had, as JSON. It is a process of
its own, so that the client that is measured does not share its interpreter, and of a lower priority, so that what it
computes itself, which is no load of the server's, takes no processor from the two.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

IDLE, HELD = 1000, 200
LARGE = 4_000_000
"""Bytes of a stalling request: just what a server takes."""

_GET = b"GET /v2 HTTP/1.1\r\nhost: x\r\n"
_POST = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
HOLDING = (
    _GET + b"\r\n\r\n",
    _GET + b"content-length: 99999999999\r\n\r\nx",
    _POST + b"content-length: 99999999999\r\n\r\nx",
    b"POST /no HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n",
    _POST + b"content-length: 9\r\n\r\n{",
    (_GET + b"\r\n") * 16,
    (_GET + b"\r\n") * 3000,
    _GET + b"x: ",
)
"""What a client sends who then leaves its connection as it is."""


def post(path: str, body: bytes) -> bytes:
    """A request of JSON."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stalling(name: str, row: dict) -> list[bytes]:
    """Requests that took seconds of everybody, as large as the server takes them; `row` is a valid one."""
    texts = [column for column, value in row.items() if isinstance(value, str)] or list(row)
    longest = [row | {texts[len(texts) // 2]: f"{i:060000d}"} for i in range(LARGE // 61_000)]
    numbers = [
        {"name": n, "shape": [1, 1], "datatype": t, "data": [0]} for n, t in (("dense", "FP32"), ("ids", "INT32"))
    ]
    outputs = [{"name": "logit"}] * 20_000
    return [
        post("/v1/score", b'{"a":[' + b"[]," * (LARGE // 3 - 10) + b"[]]}"),
        post("/v1/score", b'{"rows":' + b"[" * 1000 + b"]" * 1000 + b"}"),
        post("/v1/score", json.dumps({"rows": [row | {texts[0]: "u" * (LARGE - 1000)}]}).encode()),
        post("/v1/score", json.dumps({"rows": [row | {texts[-1]: "b|" * (LARGE // 2 - 1000)}]}).encode()),
        post("/v1/score", json.dumps({"rows": [row | {texts[-1]: [0] * (LARGE // 3 - 1000)}]}).encode()),
        post("/v1/score", json.dumps({"rows": longest}).encode()),
        post(f"/v2/models/{name}/infer", json.dumps({"inputs": numbers, "outputs": outputs}).encode()),
        _POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 100_000,
        _POST + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 100_000,
        _GET + b"".join(b"x%d: y\r\n" % i for i in range(10_000)) + b"\r\n",
    ]


def small(row: dict) -> Iterator[bytes]:
    """Requests that are refused, no two alike, without end."""
    for i in itertools.count():
        yield post("/v1/score", b'{"rows": [{"x%d": %d}]}' % (i, i))
        yield post("/v1/score", json.dumps({"rows": [row | {next(iter(row)): {"deep": [[i]]}}]}).encode())
        yield post(f"/v2/models/{i}/infer", b"{")
        yield post("/v1/score", json.dumps({"rows": [row | dict.fromkeys(row, f"{i:01000d}")]}).encode())
        yield b"POST /%d HTTP/1.1\r\nhost: x\r\nx%d: y\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n" % (
            i,
            i,
        )


def answer(connection: socket.socket) -> bytes:
    """The head of an answer, its body read too; empty if the server closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(1 << 16)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields[b"content-length"]) - len(body)
    while left > 0:
        part = connection.recv(1 << 16)
        if not part:
            return b""
        left -= len(part)
    return head


def send_small(address: tuple[str, int], row: dict, count: int, statuses: dict[str, int]) -> None:
    """So many refused requests, one connection after the other; `statuses` counts the answers."""
    requests = small(row)
    sent = 0
    while sent < count:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=30) as connection:
            for request in itertools.islice(requests, min(1000, count - sent)):
                sent += 1
                connection.sendall(request)
                status = answer(connection)[9:12].decode() or "closed"
                statuses[status] = statuses.get(status, 0) + 1
                if status == "closed":
                    break


def _keep_open(address: tuple[str, int], sent: list[bytes], counts: dict[str, int], stop: threading.Event) -> None:
    """Connections on each of which one of `sent` was sent; those that the server closes are opened anew."""
    held: dict[int, socket.socket] = {}
    while not stop.is_set():
        for i, data in enumerate(sent):
            gone = i not in held
            if not gone and i % 10 == counts["turns"] % 10:
                try:
                    gone = not held[i].recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                except BlockingIOError:
                    gone = False
                except OSError:
                    gone = True
            if gone:
                with contextlib.suppress(OSError):
                    held.pop(i, socket.socket()).close()
                    held[i] = socket.create_connection(address, timeout=5)
                    counts["opened"] += 1
                    held[i].setblocking(False)
                    held[i].send(data)
        counts["turns"] += 1
        time.sleep(0.1)


def main() -> None:
    """Be hostile until told to stop."""
    host, port, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    address = (host, port)
    os.nice(10)
    with urllib.request.urlopen(f"http://{host}:{port}/status.json") as response:
        row = json.loads(response.read())["example"]
    stop = threading.Event()
    counts = {"opened": 0, "turns": 0}
    sent = [b""] * IDLE + list(itertools.islice(itertools.cycle(HOLDING), HELD))
    threading.Thread(target=_keep_open, args=(address, sent, counts, stop), daemon=True).start()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    statuses: dict[str, int] = {}
    for request in itertools.cycle(stalling(name, row)):
        if stop.wait(0.2):
            break
        status = "closed"
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=60) as connection:
            with contextlib.suppress(OSError):  # It may be refused before all of it is sent.
                connection.sendall(request)
            status = answer(connection)[9:12].decode() or "closed"
        statuses[status] = statuses.get(status, 0) + 1
    print(json.dumps({"connections": counts["opened"], "stalling": statuses}))


if __name__ == "__main__":
    main()
