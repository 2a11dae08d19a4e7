"""Our server beside FastAPI + PyTorch: rates at a latency limit, and one prediction in process, with equal weights.

Ours twice: as it is by default, and with --kernels=native.

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

import numpy as np
from measure import ROOT, replace_section
from prometheus_client.parser import text_string_to_metric_families

from dlrm_jax.serving.http import load_generator as generator
from dlrm_jax.serving.http.telemetry import STAGES

PEERS = ROOT / "experiments" / "peers"
TITLES = {"ours": "ours", "native": "ours, native", "torch": "PyTorch"}


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
    """How each side's server starts; the port follows, as a part of the last word."""
    ours = [sys.executable, "-m", "dlrm_jax.serve", f"--model={flags.model}"]
    torch = [flags.torch_python, str(PEERS / "fastapi_torch.py"), str(flags.model)]
    return {"ours": [*ours, "--port="], "native": [*ours, "--kernels=native", "--port="], "torch": [*torch, ""]}


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


def highest_rates(
    flags: argparse.Namespace, side: str, breakdowns: dict[tuple[int, str], str]
) -> dict[int, generator.Run | None]:
    """The highest rate of one side's server at each number of candidates; where our time goes at it."""
    port = free_port()
    *words, last = commands(flags)[side]
    process, target = start([*words, f"{last}{port}"], port)
    found: dict[int, generator.Run | None] = {}
    try:
        for candidates in flags.candidates:
            bodies = generator.make_requests(target, candidates, flags.api == "binary", seed=0)
            generator.run(target, bodies, 50, 1.0)  # What is only slow at first.
            begin = {1: 200.0, 64: 60.0}.get(candidates, 20.0)
            runs = generator.find_max_qps(target, bodies, begin, flags.p99_ms / 1e3, flags.seconds, 64, 0)
            best = generator.best_of(runs, flags.p99_ms / 1e3)
            found[candidates] = best
            if side != "torch" and best is not None:
                breakdowns[candidates, side] = breakdown(flags, port, target, bodies, best.qps)
    finally:
        process.terminate()
        process.wait(30)
    return found


def compare_servers(flags: argparse.Namespace) -> str:
    """Markdown: the best of all rounds."""
    best: dict[tuple[str, int], generator.Run] = {}
    breakdowns: dict[tuple[int, str], str] = {}
    for _ in range(flags.rounds):
        for side in TITLES:
            for candidates, run in highest_rates(flags, side, breakdowns).items():
                key = (side, candidates)
                if run is not None and (key not in best or run.qps > best[key].qps):
                    best[key] = run
    lines = [
        f"| candidates, p99 <= {flags.p99_ms:g} ms "
        f"| {' | '.join(f'{title}: requests/s; p50, p99' for title in TITLES.values())} "
        "| ours over FastAPI + PyTorch | native over it |",
        "|---|---|---|---|---|---|",
    ]
    for candidates in flags.candidates:
        cells, rates = [], {}
        for side in TITLES:
            run = best.get((side, candidates))
            summary = run.summary() if run else {"qps": 0.0}
            rates[side] = summary["qps"]
            held = "**{qps:,.0f}**; {p50_ms:.1f}, {p99_ms:.1f} ms"
            cells.append(held.format(**summary) if run else "none, from 1/s on")
        for side in ("ours", "native"):
            cells.append(f"{rates[side] / rates['torch']:.1f}x" if rates["torch"] else "-")
        lines.append(f"| {candidates} | {' | '.join(cells)} |")
    lines += ["", "Where our time goes at such a rate, mean milliseconds of a request by stage:", ""]
    lines += [f"| candidates | | rate | {' | '.join(STAGES)} | seen by the client |", "|---" * (4 + len(STAGES)) + "|"]
    lines += [f"| {candidates} | {TITLES[side]} {row}" for (candidates, side), row in sorted(breakdowns.items())]
    return "\n".join(lines)


def compare_predictions(flags: argparse.Namespace) -> str:
    """Markdown: one prediction in process, the fastest and the median over all rounds."""
    sizes = ["1", "64", "2048"]
    latest = max((p for p in flags.model.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    ours = [sys.executable, str(PEERS / "predict_ours.py"), str(flags.model), *sizes]
    torch = [flags.torch_python, str(PEERS / "predict_torch.py"), str(latest), *sizes]
    runs: dict[str, list[dict]] = {side: [] for side in TITLES}
    for _ in range(flags.rounds):
        for side, command in (("ours", ours), ("native", [*ours, "--native"]), ("torch", torch)):
            output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            runs[side].append(json.loads(output))
    lines = [
        f"| batch | {' | '.join(f'{title}: fastest, median' for title in TITLES.values())} "
        "| PyTorch over ours: fastest, medians | over native |",
        "|---|---|---|---|---|---|",
    ]
    for size in sizes:
        assert_agree([runs[side][0][size]["probability"] for side in TITLES])
        fast = {side: min(run[size]["least_ms"] for run in runs[side]) for side in TITLES}
        median = {side: min(run[size]["median_ms"] for run in runs[side]) for side in TITLES}
        cells = [f"{fast[side]:.2f}, {median[side]:.2f} ms" for side in TITLES]
        for side in ("ours", "native"):
            cells.append(f"{fast['torch'] / fast[side]:.1f}x, {median['torch'] / median[side]:.1f}x")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def assert_agree(probabilities: list[list[float]]) -> None:
    """All sides say the same of the first rows."""
    difference = float(np.ptp(np.array(probabilities), axis=0).max())
    assert difference < 1e-5, f"they disagree by {difference}"


def stamp(flags: argparse.Namespace) -> str:
    """Date, hardware, versions, load."""
    torch = subprocess.run(
        [flags.torch_python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    load = os.getloadavg()[0]
    return (
        f"Measured {datetime.date.today()}, {os.cpu_count()} {platform.machine()} cores (load of the whole machine at "
        f"the end: {load:.1f}), jax {metadata.version('jax')}, torch {torch}; "
        f"`python experiments/serving_comparison.py --part={flags.part} --rounds={flags.rounds}`."
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
