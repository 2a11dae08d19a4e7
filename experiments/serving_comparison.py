"""Our server beside FastAPI + PyTorch: rates at a latency limit, and one prediction in process, with equal weights.

`python experiments/serving_comparison.py --model=DIR --torch_python=PYTHON [--part=process|server]` writes the section
of that part in experiments/README.md. DIR is what experiments/peers/kaggle_shaped.py exports; PYTHON has torch,
fastapi, uvicorn, uvloop and httptools. Sides take turns, --rounds of them, so that what else the machine does falls on
both.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from importlib import metadata

from measure import ROOT, replace_section
from prometheus_client.parser import text_string_to_metric_families

from dlrm_jax.serving import load_generator as generator
from dlrm_jax.serving.telemetry import STAGES

PEERS = ROOT / "experiments" / "peers"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], port: int) -> tuple[subprocess.Popen, generator.Target]:
    """A server that answers, and its model."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    for _ in range(600):
        time.sleep(0.2)
        try:
            return process, generator.discover(f"http://127.0.0.1:{port}")
        except (OSError, ValueError, KeyError):
            if process.poll() is not None:
                break
    raise SystemExit(f"{' '.join(command)} does not answer")


def commands(flags: argparse.Namespace) -> dict[str, list[str]]:
    """How each side's server starts, but for the port."""
    ours = [sys.executable, "-m", "dlrm_jax.serve", f"--model={flags.model}", "--port="]
    return {"ours": ours, "torch": [flags.torch_python, str(PEERS / "fastapi_torch.py"), str(flags.model)]}


def stage_sums(port: int) -> dict[str, tuple[float, float]]:
    """(seconds, requests) of each stage so far, as our server counts them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [s for family in families if family.name == "dlrm_stage_seconds" for s in family.samples]
    sums = {s.labels["stage"]: s.value for s in samples if s.name.endswith("_sum")}
    return {s.labels["stage"]: (sums[s.labels["stage"]], s.value) for s in samples if s.name.endswith("_count")}


def breakdown(flags: argparse.Namespace, port: int, target: generator.Target, bodies: list[bytes], qps: float) -> str:
    """A row of Markdown: mean ms of each stage at a rate."""
    before = stage_sums(port)
    run = generator.run(target, bodies, qps, flags.seconds, 64)
    after = stage_sums(port)
    means = {}
    for stage in STAGES:
        (seconds, count), (seconds_before, count_before) = after[stage], before.get(stage, (0.0, 0.0))
        means[stage] = (seconds - seconds_before) / max(count - count_before, 1) * 1e3
    seen = float(run.latency[run.status == 200].mean()) * 1e3
    cells = [f"{ms:.2f}" for ms in (*means.values(), seen)]
    return f"| {qps:,.0f}/s | {' | '.join(cells)} |"


def highest_rates(flags: argparse.Namespace, side: str, breakdowns: dict[int, str]) -> dict[int, generator.Run | None]:
    """The highest rate of one side's server at each number of candidates; where our time goes at it."""
    port = free_port()
    command = commands(flags)[side]
    command = [*command[:-1], f"--port={port}"] if side == "ours" else [*command, str(port)]
    process, target = start(command, port)
    found: dict[int, generator.Run | None] = {}
    try:
        for candidates in flags.candidates:
            bodies = generator.make_requests(target, candidates, flags.api == "binary", seed=0)
            generator.run(target, bodies, 50, 1.0)  # What is only slow at first.
            begin = {1: 200.0, 64: 60.0}.get(candidates, 20.0)
            runs = generator.find_max_qps(target, bodies, begin, flags.p99_ms / 1e3, flags.seconds, 64, 0)
            best = generator.best_of(runs, flags.p99_ms / 1e3)
            found[candidates] = best
            if side == "ours" and best is not None:
                breakdowns[candidates] = breakdown(flags, port, target, bodies, best.qps)
    finally:
        process.terminate()
        process.wait(30)
    return found


def compare_servers(flags: argparse.Namespace) -> str:
    """Markdown: the best of all rounds."""
    best: dict[tuple[str, int], generator.Run] = {}
    breakdowns: dict[int, str] = {}
    for _ in range(flags.rounds):
        for side in ("ours", "torch"):
            for candidates, run in highest_rates(flags, side, breakdowns).items():
                key = (side, candidates)
                if run is not None and (key not in best or run.qps > best[key].qps):
                    best[key] = run
    lines = [
        f"| candidates | ours: requests/s, p99 <= {flags.p99_ms:g} ms | p50, p99 "
        "| FastAPI + PyTorch | p50, p99 | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for candidates in flags.candidates:
        cells, rates = [], []
        for side in ("ours", "torch"):
            run = best.get((side, candidates))
            summary = run.summary() if run else {"qps": 0.0, "p50_ms": float("nan"), "p99_ms": float("nan")}
            rates.append(summary["qps"])
            cells += [f"**{summary['qps']:,.0f}**", f"{summary['p50_ms']:.1f}, {summary['p99_ms']:.1f} ms"]
        ratio = f"{rates[0] / rates[1]:.1f}x" if rates[1] else "-"
        lines.append(f"| {candidates} | {' | '.join(cells)} | {ratio} |")
    lines += ["", "Where our time goes at such a rate, mean milliseconds of a request by stage:", ""]
    lines += [f"| candidates | rate | {' | '.join(STAGES)} | seen by the client |", "|---" * (3 + len(STAGES)) + "|"]
    lines += [f"| {candidates} {row}" for candidates, row in breakdowns.items()]
    return "\n".join(lines)


def compare_predictions(flags: argparse.Namespace) -> str:
    """Markdown: one prediction in process, the fastest and the median over all rounds."""
    ours: list[dict] = []
    theirs: list[dict] = []
    sizes = ["1", "64", "2048"]
    latest = max((p for p in flags.model.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    for _ in range(flags.rounds):
        for python, script, model, into in (
            (sys.executable, "predict_ours.py", flags.model, ours),
            (flags.torch_python, "predict_torch.py", latest, theirs),
        ):
            command = [python, str(PEERS / script), str(model), *sizes]
            output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            into.append(json.loads(output))
    lines = [
        "| batch | ours: fastest, median | PyTorch: fastest, median | ratio of the fastest | of medians |",
        "|---|---|---|---|---|",
    ]
    for size in sizes:
        sides = [
            (min(r[size]["least_ms"] for r in runs), min(r[size]["median_ms"] for r in runs)) for runs in (ours, theirs)
        ]
        difference = max(
            abs(a - b) for a, b in zip(ours[0][size]["probability"], theirs[0][size]["probability"], strict=True)
        )
        assert difference < 1e-5, f"the two disagree by {difference}"
        (fast, median), (other_fast, other_median) = sides
        lines.append(
            f"| {size} | {fast:.2f}, {median:.2f} ms | {other_fast:.2f}, {other_median:.2f} ms "
            f"| {other_fast / fast:.1f}x | {other_median / median:.1f}x |"
        )
    return "\n".join(lines)


def stamp(flags: argparse.Namespace) -> str:
    """Date, hardware, versions, load."""
    torch = subprocess.run(
        [flags.torch_python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    load = os.getloadavg()[0]
    return (
        f"Measured {datetime.date.today()}, {os.cpu_count()} {platform.machine()} cores (load of the whole machine at "
        f"the end: {load:.1f}), jax {metadata.version('jax')}, torch {torch}; "
        f"`python experiments/serving_comparison.py --rounds={flags.rounds}`."
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--part", choices=("process", "server"), default="server")
    parser.add_argument("--api", choices=("binary", "json"), default="json")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--p99_ms", type=float, default=25.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=2)
    flags = parser.parse_args()
    text = compare_servers(flags) if flags.part == "server" else compare_predictions(flags)
    text = f"{text}\n\n{stamp(flags)}"
    print(text)
    replace_section(ROOT / "experiments" / "README.md", f"serving_{flags.part}", text)


if __name__ == "__main__":
    main()
