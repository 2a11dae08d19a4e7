"""Soak, overload, attack: `python experiments/soak.py --model=DIR [--qps=RATE] [--part=soak|overload|attack]`.

RATE is found first if it is not given: the highest, of requests of --candidates rows, that are all served with a p99 of
--p99_ms at most. soak: a server on a copy of DIR, 0.8 x RATE requests a second with a reload (the latest version once
more, as the next number) every --reload_seconds, while other clients vanish in mid-request and send malformed ones.
Every valid request must be answered 200, and the scores be the offline ones; memory is sampled. overload: RATE, three
times of it for a while, then RATE again. attack: a steady client of 0.2 x RATE, alone, beside hostile ones (hostile.py)
of another server, which take but processors, and beside hostile ones of its own, each for a tenth of --seconds; then
--hostile_requests more that are refused, while memory is sampled.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import hostile
import numpy as np
from measure import ROOT, replace_section, where_and_when
from serving_comparison import free_port, start

from dlrm_jax.serving import load
from dlrm_jax.serving.http import load_generator as generator
from dlrm_jax.training.reporting import versions

CONNECTIONS = 256
MALFORMED = (b"{", b'{"rows": 1}', b'{"rows": [{"x": 1}]}', b"\xff" * 50, b'{"rows": [' + b"[" * 2000, b"")


def memory(process: subprocess.Popen) -> float:
    """Resident MB of a process."""
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Rude(threading.Thread):
    """Clients that vanish, and that send what is no request, until told to stop."""

    def __init__(self, target: generator.Target, body: bytes) -> None:
        super().__init__(daemon=True)
        self._target, self._body, self.stop = target, body, False
        self.vanished, self.refused, self.others = 0, 0, []

    def run(self) -> None:
        """Be rude ten times a second."""
        rng = random.Random(0)
        while not self.stop:
            time.sleep(0.1)
            address = (self._target.host, self._target.port)
            try:
                with socket.create_connection(address, timeout=5) as connection:
                    if rng.random() < 0.5:
                        connection.sendall(self._body[: rng.randrange(1, len(self._body))])
                        self.vanished += 1
                        continue
                    connection.sendall(generator.http_request(self._target, "/v1/score", rng.choice(MALFORMED)))
                    status = int(connection.recv(200).split()[1])
                    self.refused += 400 <= status < 500
                    if not 400 <= status < 500:
                        self.others.append(status)
            except OSError as error:
                self.others.append(repr(error))


class Reloader(threading.Thread):
    """Makes the latest version the next one, again and again; older ones are removed."""

    def __init__(self, model_dir: pathlib.Path, seconds: float) -> None:
        super().__init__(daemon=True)
        self._model_dir, self._seconds, self.stop, self.count = model_dir, seconds, False, 0

    def run(self) -> None:
        """Copy, rename, and clear away."""
        number = 1
        while not self.stop:
            time.sleep(self._seconds)
            # Hard links: a version's files do not change, and a copy of gigabytes would be a test of the disk.
            new = self._model_dir / ".next"
            shutil.copytree(self._model_dir / str(number), new, copy_function=os.link)
            new.rename(self._model_dir / str(number + 1))
            if number > 1:
                shutil.rmtree(self._model_dir / str(number - 1), ignore_errors=True)
            number, self.count = number + 1, self.count + 1


def highest_rate(flags: argparse.Namespace) -> float:
    """The highest rate of which all are served, with the p99 that was asked for; by a server as it is by default."""
    port = free_port()
    process, target = start([sys.executable, "-m", "dlrm_jax.serve", f"--model={flags.model}", f"--port={port}"], port)
    bodies = generator.make_requests(target, flags.candidates, True, 0)
    runs = generator.find_max_qps(target, bodies, 1000.0, flags.p99_ms / 1e3, 5.0, CONNECTIONS, 0)
    process.terminate()
    process.wait(30)
    best = generator.best_of(runs, flags.p99_ms / 1e3)
    if best is None:
        raise SystemExit(f"no rate from 1/s on holds a p99 of {flags.p99_ms:g} ms")
    return best.qps


def soak(flags: argparse.Namespace) -> str:
    """Markdown of a soak."""
    with tempfile.TemporaryDirectory(dir=flags.model.resolve().parent) as directory:
        model_dir = pathlib.Path(directory)
        shutil.copytree(flags.model / "1", model_dir / "1", copy_function=os.link)
        port = free_port()
        command = [sys.executable, "-m", "dlrm_jax.serve", f"--model={model_dir}", f"--port={port}", "--poll_seconds=1"]
        command += [f"--max_wait_ms={flags.max_wait_ms:g}"] if flags.max_wait_ms else []
        process, target = start(command, port)
        bodies = generator.make_requests(target, flags.candidates, True, 0)
        rude, reloader = Rude(target, bodies[0]), Reloader(model_dir, flags.reload_seconds)
        rude.start()
        reloader.start()
        samples, summaries, latency = [], [], []
        slices = max(1, round(flags.seconds / 10))
        for i in range(slices):
            run = generator.run(target, bodies, 0.8 * flags.qps, flags.seconds / slices, seed=i)
            summaries.append(run.summary())
            latency.append(run.latency[run.status == 200])
            samples.append(memory(process))
        rude.stop = reloader.stop = True
        worst = check_scores(flags, target)
        alive = process.poll() is None
        process.terminate()
        status = process.wait(30)
    served = np.concatenate(latency) * 1e3
    total, refused, failed = (sum(s[key] for s in summaries) for key in ("requests", "refused", "failed"))
    third = samples[len(samples) // 3 :]
    return (
        f"{flags.seconds:g} s at {0.8 * flags.qps:,.0f} requests/s of {flags.candidates}, 0.8 of the highest rate with "
        f"a p99 of {flags.p99_ms:g} ms: {total:,} valid requests, "
        f"{refused} refused, {failed} failed; p50 {np.percentile(served, 50):.1f} ms, "
        f"p99 {np.percentile(served, 99):.1f} ms; {reloader.count} reloads; {rude.vanished} clients vanished, "
        f"{rude.refused} malformed requests got 4xx, other answers: {rude.others or 'none'}; "
        f"memory {third[0]:,.0f} MB after a third, {third[-1]:,.0f} MB at the end; "
        f"largest difference from offline scores {worst:.1e}; alive at the end: {alive}, exit status {status}."
    )


def check_scores(flags: argparse.Namespace, target: generator.Target) -> float:
    """The largest difference of answers from offline scores, with many requests under way at once."""
    model = load(flags.model)
    rng = np.random.default_rng(5)
    worst = 0.0

    async def ask(dense: np.ndarray, ids: np.ndarray) -> list[float]:
        tensors = [("dense", "FP32", dense), ("ids", "INT32", ids)]
        inputs = [{"name": n, "datatype": t, "shape": list(v.shape), "data": v.ravel().tolist()} for n, t, v in tensors]
        body = json.dumps({"inputs": inputs, "outputs": [{"name": "probability"}]}).encode()
        reader, writer = await asyncio.open_connection(target.host, target.port)
        writer.write(generator.http_request(target, f"/v2/models/{target.name}/infer", body))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(x.split(b":")[1] for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")))
        answer = json.loads(await reader.readexactly(length))
        writer.close()
        return answer["outputs"][0]["data"]

    async def ask_all(rows: list) -> list:
        return await asyncio.gather(*(ask(*row) for row in rows))

    for _ in range(10):
        rows = []
        for size in rng.integers(1, 30, 20):
            dense = rng.normal(size=(size, target.num_dense)).astype(np.float32)
            rows.append((dense, rng.integers(0, target.limits, (size, target.num_slots)).astype(np.int32)))
        for (dense, ids), got in zip(rows, asyncio.run(ask_all(rows)), strict=True):
            worst = max(worst, float(np.abs(model.predict(dense, ids) - np.array(got)).max()))
    return worst


def overload(flags: argparse.Namespace) -> str:
    """Markdown of an overload."""
    port = free_port()
    command = [sys.executable, "-m", "dlrm_jax.serve", f"--model={flags.model}", f"--port={port}"]
    command += [f"--max_wait_ms={flags.max_wait_ms or 6:g}"]
    process, target = start(command, port)
    bodies = generator.make_requests(target, flags.candidates, True, 0)
    lines = [
        "| offered | served | refused | failed | p50 served | p99 served | p99 refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for factor, seconds in ((1.0, 5.0), (3.0, flags.overload_seconds), (1.0, 1.0), (1.0, 5.0)):
        s = generator.run(target, bodies, flags.qps * factor, seconds, CONNECTIONS).summary()
        lines.append(
            f"| {factor:g} x {flags.qps:,.0f}/s, {seconds:g} s | {s['served_qps']:,.0f}/s | {s['refused']} "
            f"| {s['failed']} | {s['p50_ms']:.1f} ms | {s['p99_ms']:.1f} ms | {s.get('refused_p99_ms', '-')} |"
        )
    process.terminate()
    process.wait(30)
    return "\n".join(lines)


def attack(flags: argparse.Namespace) -> str:
    """Markdown of an attack."""
    with contextlib.ExitStack() as running:
        servers = []
        for _ in range(2):
            port = free_port()
            command = [sys.executable, "-m", "dlrm_jax.serve", f"--model={flags.model}", f"--port={port}"]
            servers.append(start(command, port))
            running.callback(end, servers[-1][0])
        return attacked(flags, *servers)


def end(process: subprocess.Popen) -> int:
    """End a server, if it is there still; its exit status."""
    if process.poll() is None:
        process.terminate()
    return process.wait(30)


Server = tuple[subprocess.Popen, generator.Target]


def attacked(flags: argparse.Namespace, ours: Server, another: Server) -> str:
    """The table of a steady client of `ours`, whom hostile clients of that or of `another` server disturb."""
    (process, target), (other, elsewhere) = ours, another
    bodies = generator.make_requests(target, flags.candidates, True, 0)
    rate, seconds = 0.2 * flags.qps, flags.seconds / 10

    def steady() -> dict:
        return generator.run(target, bodies, rate, seconds, 8).summary()

    steady()  # Its first requests, which are slower, are nobody's.
    alone = steady()

    def steady_beside(attacked: generator.Target) -> tuple[dict, dict]:
        command = [sys.executable, str(pathlib.Path(hostile.__file__)), attacked.host, str(attacked.port), target.name]
        others = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(5)
        return steady(), json.loads(others.communicate()[0])

    apart, _ = steady_beside(elsewhere)
    end(other)
    beside, had = steady_beside(target)
    status: dict[str, int] = {}
    samples = []
    with urllib.request.urlopen(f"http://{target.host}:{target.port}/status.json") as response:
        row = json.loads(response.read())["example"]
    for _ in range(10):
        hostile.send_small((target.host, target.port), row, flags.hostile_requests // 10, status)
        samples.append(memory(process))
    alive = process.poll() is None
    lines = ["| steady client | requests | refused | failed | p50 | p99 |", "|---|---|---|---|---|---|"]
    for name, s in (("alone", alone), ("hostile ones of another server", apart), ("hostile ones beside it", beside)):
        numbers = f"{s['requests']} | {s['refused']} | {s['failed']} | {s['p50_ms']:.1f} ms | {s['p99_ms']:.1f} ms"
        lines.append(f"| {name}, {rate:,.0f}/s, {seconds:g} s | {numbers} |")
    return "\n".join(lines) + (
        f"\n\nBeside: {hostile.IDLE} idle and {hostile.HELD} held connections ({had['connections']} were opened), and "
        f"stalling requests, one after the other (answers by status: {had['stalling']}). Then {sum(status.values()):,} "
        f"hostile requests (answers: {status}): memory {samples[0]:,.0f} MB after a tenth, {samples[-1]:,.0f} MB at "
        f"the end; alive at the end: {alive}, exit status {end(process)}."
    )


def main() -> None:
    """Run one part and write its section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--qps", type=float)
    parser.add_argument("--p99_ms", type=float, default=25.0)
    parser.add_argument("--part", choices=("soak", "overload", "attack"), default="soak")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--hostile_requests", type=int, default=200_000)
    parser.add_argument("--reload_seconds", type=float, default=20.0)
    parser.add_argument("--overload_seconds", type=float, default=10.0)
    parser.add_argument("--max_wait_ms", type=float, help="default: the server's own to soak, 6 for overload")
    flags = parser.parse_args()
    flags.model = flags.model.resolve()  # Servers start in the checkout.
    flags.qps = flags.qps or highest_rate(flags)
    text = {"soak": soak, "overload": overload, "attack": attack}[flags.part](flags)
    command = f"python experiments/soak.py --part={flags.part} --candidates={flags.candidates}"
    text += f"\n\nMeasured {where_and_when(versions())}; `{command}`."
    print(text)
    replace_section(ROOT / "experiments" / "README.md", f"serving_{flags.part}", text)


if __name__ == "__main__":
    main()
