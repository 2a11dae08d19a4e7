"""What we mean to reach on one GPU, held against the GPU at hand.

    pip install ".[gpu,peers]" && python experiments/gpu_goals.py [--parts=own,peers,scatter] [--readme]

`own` measures our step by `dlrm_jax.benchmark`, in several ways each; `peers` sets it beside PyTorch
(compare_peers.py); `scatter` times adding gradients to rows where ids repeat (dlrm_jax/host/gpu_atomics.py), by XLA's
scatter and by the optimizers. On a CPU it runs too, cut down by `--max_rows_per_table=N --batch_divisor=N`, to see that
it works.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# The processes that measure need the memory too.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np
from measure import replace_section, where_and_when

from dlrm_jax.config import OptimizerConfig, ScheduleConfig
from dlrm_jax.host import gpu_atomics
from dlrm_jax.planning.calibrate import seconds
from dlrm_jax.tables.rules import make_rule
from dlrm_jax.tables.updates import SparseGrad, Stored, Update
from dlrm_jax.training.reporting import versions

HERE = pathlib.Path(__file__).resolve().parent
SHAPES: dict[str, tuple[str, int, int, tuple[str, float]]] = {
    # flag file, batch, rows a table at most (0: all), and the goal: of a step, or of a second
    "kaggle_b2048": ("shape_kaggle", 2048, 0, ("ms", 0.30)),
    "kaggle_b32768": ("shape_kaggle", 32768, 0, ("ms", 1.2)),
    "terabyte_b65536": ("shape_terabyte", 65536, 0, ("samples/s", 20e6)),
    "dcnv2_b6912": ("shape_mlperf_dcnv2", 6912, 8_000_000, ("samples/s", 1.0e6)),
}
WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    # flags, XLA_FLAGS
    "as it is": ((), ""),
    "bfloat16 MLPs": (("--compute_dtype=bfloat16",), ""),
    "bfloat16, 8 steps a dispatch": (("--compute_dtype=bfloat16", "--steps_per_dispatch=8"), ""),
    "bfloat16, no command buffers": (("--compute_dtype=bfloat16",), "--xla_gpu_enable_command_buffer="),
}
PEERS = ("kaggle_b2048", "kaggle_b32768", "terabyte_b65536")
SLOTS, ROWS, WIDTH = 53_248, 1_000_000, 16


def own(name: str, way: str, most_rows: int, divisor: int) -> dict[str, Any]:
    """Step time, rate and memory of a shape in one of WAYS, measured by a process of its own."""
    preset, batch, rows, _ = SHAPES[name]
    extra, xla_flags = WAYS[way]
    rows = min(filter(None, (rows, most_rows)), default=0)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "dlrm_jax.benchmark", f"--flagfile=experiments/{preset}.flags", *extra]
        command += [f"--batch_size={batch // divisor}", f"--num_examples={8 * batch // divisor}", "--seconds=2"]
        command += [f"--max_rows_per_table={rows}"] if rows else []
        flags = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags if jax.default_backend() != 'cpu' else ''}"
        environment = os.environ | {"XLA_FLAGS": flags.strip()}
        subprocess.run([*command, f"--json={directory}/b.json"], cwd=HERE.parent, env=environment, check=True)
        return json.loads(pathlib.Path(directory, "b.json").read_text())


def own_table(most_rows: int, divisor: int) -> str:
    """Markdown, a row a shape and way."""
    lines = ["| configuration | way | step | samples/s | peak memory | goal |", "|---|---|---|---|---|---|"]
    for name, (*_, (unit, goal)) in SHAPES.items():
        for way in WAYS:
            found = own(name, way, most_rows, divisor)
            milliseconds, rate = found["train"]["step_seconds"] * 1e3, found["train"]["samples_per_second"]
            limit = f"at most {goal} ms" if unit == "ms" else f"at least {goal / 1e6:.0f} M samples/s"
            met = "met" if (milliseconds <= goal if unit == "ms" else rate >= goal) else "missed"
            cells = [
                name,
                way,
                f"**{milliseconds:.3f} ms**",
                f"{rate / 1e6:.2f} M",
                f"{found['peak_bytes'] / 1e9:.1f} GB",
            ]
            lines.append(f"| {' | '.join([*cells, f'{limit}: {met}'])} |")
    return "\n".join(lines)


def peers_table(most_rows: int) -> str:
    """The table that compare_peers.py prints of PyTorch, SGD."""
    command = [sys.executable, "experiments/compare_peers.py", f"--configs={','.join(PEERS)}", "--optimizers=sgd"]
    command += ["--peers=torch", *([f"--max_rows_per_table={most_rows}"] if most_rows else [])]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    # It prints one table a configuration, each with the same head.
    lines = dict.fromkeys(line for line in done.stdout.splitlines() if line.startswith("|"))
    return "\n".join(lines) + (f"\n\nended with status {done.returncode}" if done.returncode else "")


def scatter_table() -> str:
    """Markdown: adding SLOTS rows, to rows anywhere and to three rows only, by XLA's scatter and by the optimizers."""
    lines = ["| way | rows anywhere | three rows | ratio |", "|---|---|---|---|"]
    table, grad = jnp.zeros((ROWS, WIDTH)), jnp.ones((SLOTS, WIDTH))
    ids = [jnp.asarray(np.random.default_rng(0).integers(0, most, SLOTS), jnp.int32) for most in (ROWS, 3)]
    ways: dict[str, Callable[..., Any]] = {"scatter": lambda table, ids, rows: table.at[ids].add(rows)}
    for name in ("sgd", "rowwise_adagrad"):
        rule = make_rule(OptimizerConfig(ScheduleConfig(0.1), table=name))
        update = Update(rule, jnp.float32(0.1), jnp.int32(1))
        slots = {slot.name: jnp.zeros((ROWS, slot.width(WIDTH))) for slot in rule.slots}
        ways[name] = lambda table, ids, rows, update=update, slots=slots: update.by_rows(
            SparseGrad(ids, rows), Stored(table, slots)
        )
    for name, way in ways.items():
        # The table's copy, which a step does not make, is in all of these.
        anywhere, few = (seconds(jax.jit(way), table, one, grad) for one in ids)
        lines.append(f"| {name} | {anywhere * 1e3:.3f} ms | {few * 1e3:.3f} ms | {few / anywhere:.1f}x |")
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="scatter,own,peers")
    parser.add_argument("--max_rows_per_table", type=int, default=0, help="cut tables, to fit this machine; 0: no")
    parser.add_argument("--batch_divisor", type=int, default=1, help="smaller batches, to see it work on a CPU")
    parser.add_argument("--readme", action="store_true", help="renew the section of experiments/README.md")
    arguments = parser.parse_args()
    gpu_atomics.use_hardware_additions()
    parts: dict[str, Callable[[], str]] = {
        "scatter": scatter_table,
        "own": lambda: own_table(arguments.max_rows_per_table, arguments.batch_divisor),
        "peers": lambda: peers_table(arguments.max_rows_per_table),
    }
    if unknown := sorted(set(arguments.parts.split(",")) - set(parts)):
        parser.error(f"--parts: {unknown[0]!r} is not known; choose of {', '.join(parts)}")
    tables = []
    for part in arguments.parts.split(","):
        tables.append(parts[part]())
        print(tables[-1], flush=True)
    if arguments.readme:
        given = " ".join(sys.argv[1:])
        text = "\n\n".join(
            [*tables, f"Measured {where_and_when(versions())}; `python experiments/gpu_goals.py {given}`."]
        )
        replace_section(HERE / "README.md", "gpu", text)


if __name__ == "__main__":
    main()
