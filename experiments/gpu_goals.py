"""What we mean to reach on one GPU, held against the GPU at hand, in at most `--minutes`.

    pip install ".[gpu]" && python experiments/gpu_goals.py --readme [--parts=steps,embedding,runs,scatter]

Each thing measured is a process of its own with a time limit. What is known is written to `--json` after each, so that
a run that is cut off leaves what it found. `steps` are steps by `dlrm_jax.benchmark`; `embedding` is lookup and update
of FBGEMM's published shape; `runs` are whole runs of `dlrm_jax.train` on a prepared log, beside their step's rate;
`scatter` adds gradients to rows where ids repeat (dlrm_jax/host/gpu_atomics.py). On a CPU it runs too, cut down by
`--divisor=N`, to see that it works. compare_peers.py sets the step beside PyTorch's, which takes minutes more.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from measure import replace_section, where_and_when

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECONDS_OF_A_START = 10
"""What is not begun with less time left."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """`number` of what was measured is to be `at_most` or `at_least` this."""

    number: str
    at_most: float = math.inf
    at_least: float = 0.0

    def told(self, found: float) -> str:
        """The goal, and whether it is met."""
        limit = f"at most {self.at_most:g}" if self.at_least == 0 else f"at least {self.at_least:g}"
        return f"{self.number} {limit}: {'met' if self.at_least <= found <= self.at_most else 'missed'}"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Something measured: its part and name, its limit in seconds, what runs, what its goals are."""

    part: str
    name: str
    limit: float
    measure: Callable[[float], dict[str, float]]
    goals: tuple[Goal, ...]


class Failed(Exception):
    """A process that ended with an error: its last line."""


def run(command: list[str], limit: float) -> str:
    """What a command prints; Failed with its last line, or TimeoutExpired."""
    # Run from anywhere, it is this checkout that is measured.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise Failed(next((line for line in reversed(lines) if "rror: " in line), lines[-1])[:200])
    return done.stdout


def step_of(flags: list[str], limit: float) -> dict[str, float]:
    """A training step by dlrm_jax.benchmark: milliseconds, and M samples a second."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "b.json")
        run(["-m", "dlrm_jax.benchmark", *flags, "--seconds=2", f"--json={path}"], limit)
        found = json.loads(path.read_text())
    train, forward = found["train"], found["forward"]
    numbers = {
        "ms": train["step_seconds"] * 1e3,
        "ms, each waited for": train["waited_seconds"] * 1e3,
        "M samples/s": train["samples_per_second"] / 1e6,
        "forward ms": forward["step_seconds"] * 1e3,
    }
    return numbers | {f"{part} %": 100 * share for part, share in train.get("parts", {}).items() if share > 0.005}


def steps(divisor: int) -> Iterator[Unit]:
    """Shapes of known models, by the kernels there are."""
    bfloat16 = "--compute_dtype=bfloat16"
    dcnv2 = ("shape_mlperf_dcnv2", 6912, 8_000_000)
    hugectr = Goal("M samples/s", at_least=1.8)
    for name, (shape, batch, rows), flags, goal in (
        ("Kaggle, B=2048", ("shape_kaggle", 2048, 0), [], Goal("ms", at_most=0.30)),
        ("Kaggle, B=32768, bfloat16", ("shape_kaggle", 32768, 0), [bfloat16], Goal("ms", at_most=1.2)),
        ("Terabyte, B=65536, bfloat16", ("shape_terabyte", 65536, 0), [bfloat16], Goal("ms", at_most=2.0)),
        ("DCNv2, B=6912, bfloat16", dcnv2, [bfloat16], hugectr),
        ("DCNv2, bfloat16, XLA's kernels", dcnv2, [bfloat16, "--kernels=xla"], hugectr),
        ("DCNv2, bfloat16, Pallas for lookups too", dcnv2, [bfloat16, "--kernels=pallas"], hugectr),
    ):
        cut = rows // divisor or (2_000_000 // divisor if divisor > 1 else 0)
        flags = [f"--flagfile=experiments/{shape}.flags", *flags, f"--batch_size={batch // divisor}"]
        flags += [f"--num_examples={4 * batch // divisor}", *([f"--max_rows_per_table={cut}"] if cut else [])]
        yield Unit("steps", name, 45, lambda limit, flags=flags: step_of(flags, limit), (goal,))


def embedding(divisor: int) -> Iterator[Unit]:
    """FBGEMM's published shape, by each kind of kernels."""
    goals = (Goal("forward ms", 0.5), Goal("with SGD ms", 1.3), Goal("with Adam ms", 1.9))
    for kernels in ("xla", "pallas"):

        def measure(limit: float, kernels: str = kernels) -> dict[str, float]:
            return json.loads(run(["experiments/gpu_parts.py", "embedding", kernels, str(divisor)], limit))

        yield Unit("embedding", f"10 tables of 1.68 M x 128, 1.05 M ids, {kernels}", 45, measure, goals)


def runs(divisor: int) -> Iterator[Unit]:
    """Whole runs on a prepared log, over the rate of their step."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="gpu_goals_"))
    text, data, rows = directory / "log.txt", directory / "data", 1_500_000 // divisor

    def prepare(limit: float) -> dict[str, float]:
        start = time.perf_counter()
        run(["experiments/criteo_text.py", str(text), f"--rows={rows}"], limit)
        run(["-m", "dlrm_jax.prepare", f"--input={text}", f"--output={data}", "--schema=criteo_kaggle"], limit)
        return {"s": time.perf_counter() - start}

    yield Unit("runs", f"{rows:,} rows made and prepared", 90, prepare, ())
    for batch, share in ((2048, 75), (16384, 90), (65536, 90)):

        def whole(limit: float, batch: int = batch // divisor) -> dict[str, float]:
            end = time.perf_counter() + limit
            flags = ["--flagfile=experiments/criteo_kaggle.flags", f"--data_dir={data}"]
            flags += [f"--batch_size={batch}", "--log_every=1000"]
            workdir, num_steps = directory / f"run_{batch}", max(20, 12_000_000 // divisor // batch)
            run(
                ["-m", "dlrm_jax.train", *flags, f"--workdir={workdir}", f"--num_steps={num_steps}", "--eval_every=0"],
                limit,
            )
            result = json.loads((workdir / "result.json").read_text())
            step = step_of([*flags, "--workdir="], max(1.0, end - time.perf_counter()))
            rate = result["samples_per_second"] / 1e6
            share = 100 * rate / step["M samples/s"]
            waiting = 100 * result["input_wait_fraction"]
            return {"M samples/s": rate, "of the step %": share, "waiting for input %": waiting}

        goals = (Goal("of the step %", at_least=share),)
        yield Unit("runs", f"Kaggle, B={batch}", 60, whole, goals)


def scatter(divisor: int) -> Iterator[Unit]:
    """Adding rows to rows anywhere and to three rows only."""

    def measure(limit: float) -> dict[str, float]:
        return json.loads(run(["experiments/gpu_parts.py", "scatter", str(divisor)], limit))

    yield Unit("scatter", "adding 53,248 rows of 16", 40, measure, ())


PARTS = {"steps": steps, "embedding": embedding, "runs": runs, "scatter": scatter}


def measured(units: list[Unit], seconds: float, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """What was found of each, in turn, until the time is up; `keep` is given all of it after each."""
    end, found = time.monotonic() + seconds, []
    for unit in units:
        left = end - time.monotonic()
        record: dict[str, Any] = {"part": unit.part, "name": unit.name}
        if left < SECONDS_OF_A_START:
            record["failed"] = "not begun: the time was up"
        else:
            start = time.monotonic()
            try:
                record["numbers"] = unit.measure(min(unit.limit, left))
            except subprocess.TimeoutExpired as error:
                record["failed"] = f"took more than {error.timeout:.0f} s"
            except (Failed, OSError, ValueError, LookupError) as error:
                record["failed"] = str(error)
            record["seconds"] = time.monotonic() - start
        found.append(record)
        keep(found)
        print(row(unit, record), flush=True)
    return found


def row(unit: Unit, record: dict[str, Any]) -> str:
    """A line of the table."""
    if "failed" in record:
        return f"| {unit.name} | {record['failed']} | - |"
    numbers = record["numbers"]
    shown = ", ".join(f"{name} **{value:.3g}**" for name, value in numbers.items())
    goals = "; ".join(goal.told(numbers[goal.number]) for goal in unit.goals)
    return f"| {unit.name} | {shown} | {goals or '-'} |"


def main() -> None:
    """Measure what was asked for, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,embedding,runs,scatter")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--divisor", type=int, default=1, help="so many times smaller, to see it work on a CPU")
    parser.add_argument("--json", default="gpu_goals.json")
    parser.add_argument("--readme", action="store_true", help="renew the section of experiments/README.md")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts.split(",")) - set(PARTS)):
        parser.error(f"--parts: {unknown[0]!r} is not known; choose of {', '.join(PARTS)}")
    units = [unit for part in arguments.parts.split(",") for unit in PARTS[part](arguments.divisor)]

    def keep(found: list[dict[str, Any]]) -> None:
        pathlib.Path(arguments.json).write_text(json.dumps(found, indent=1))

    found = measured(units, arguments.minutes * 60, keep)
    if arguments.readme:
        lines = ["| what | measured | goal |", "|---|---|---|"]
        lines += [row(unit, record) for unit, record in zip(units, found, strict=True)]
        stamp = where_and_when(json.loads(run(["experiments/gpu_parts.py", "versions"], 60)))
        given = " ".join(sys.argv[1:])
        text = "\n".join([*lines, "", f"Measured {stamp}; `python experiments/gpu_goals.py {given}`."])
        replace_section(ROOT / "experiments" / "README.md", "gpu", text)


if __name__ == "__main__":
    main()
