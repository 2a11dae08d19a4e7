"""Ours beside what a user would pick instead: PyTorch (eager, compiled), TorchRec, JAX with dense gradients (optax).

    pip install ".[peers]" && python experiments/compare_peers.py \
        [--configs=kaggle_b128,kaggle_b2048,synthetic,rm1,rm2] [--json=FILE] [--picture=FILE] [--readme]

TorchRec works by FBGEMM's CPU kernels, and is left out where they are not installed. TorchRec's package asks for their
CUDA build, so both are installed without what they ask for, in the versions that belong to PyTorch's; pip will say that
fbgemm-gpu is missing:

    pip install torch==2.13.0 && pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 &&
        pip install torchmetrics==1.0.3 tensordict pyre-extensions tqdm

Ours is as it is by default, and finds its tables on huge pages, as a run of ours puts them; the peers' lie as their own
library puts them. The process keeps what it frees, as a run of ours has it, whichever side freed it.
All sides but TorchRec work where JAX does, on the CPU or the first GPU. Each peer starts from our weights, and must
have our logits before, and our logits and weights after some steps, in full float32, or is left out; times are in TF32
on a GPU, on all sides. Then all step in turn in one process, a turn being some steps on end, of which the first is not
counted; times are medians. Ids are uniform over each table, batches ready in memory. `--readme` renews the tables of
experiments/README.md.
"""

import argparse
import functools
import gc
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# On a machine that others use too, OpenMP threads that spin while they wait made PyTorch up to ten times as slow.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# A GPU's memory is for both.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax
import numpy as np
from absl import flags
from measure import replace_section, where_and_when
from peers.equal import UnequalError, check_equal
from peers.ours import Ours
from peers.report import GOALS, SIDES, draw, floor_table, rows_of, table

from dlrm_jax.api.planning import model_of
from dlrm_jax.cli.flags import config_from_flags, define_run_flags
from dlrm_jax.config import ModelConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.generate.synthetic import device_batch
from dlrm_jax.data.read.load import synthetic_spec
from dlrm_jax.host import gpu_atomics, heap
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.reporting import versions, write_json_atomically
from dlrm_jax.training.run_config import RunConfig

HERE = pathlib.Path(__file__).resolve().parent
CONFIGS = {
    "kaggle_b128": ("shape_kaggle", "--batch_size=128"),
    "kaggle_b2048": ("shape_kaggle", "--batch_size=2048"),
    "synthetic": ("shape_reference_benchmark",),
    "rm1": ("shape_deeprec_rm1",),
    "rm2": ("shape_deeprec_rm2",),
    "kaggle_b32768": ("shape_kaggle", "--batch_size=32768"),
    "terabyte_b65536": ("shape_terabyte", "--batch_size=65536"),
}
"""The last two are for GPUs."""
DEFAULT_CONFIGS = tuple(CONFIGS)[:5]
PEERS = {
    "torch": ("torch_dlrm", "TorchDLRM", 3),
    "torchrec": ("torchrec_dlrm", "TorchRecDLRM", 3),
    "dense_jax": ("dense_jax", "DenseJax", 4),
}
"""Module in peers/, class, and how many copies of the tables stand in memory at once, ours among them."""
OPTIMIZERS = ("sgd", "rowwise_adagrad")
FORWARD = "forward"
FLOOR_TEXT = """\
The floor (`peers/floor.py`) is what XLA takes here for the MLPs' float32 products, and for reading and writing as many
bytes as the rows have, in order, each by itself: a step made of these cannot be faster. A peer's step over it, in bold,
is how many times as fast as that peer such a step is at most. All ratios are those of turns taken together: a peer's
are to ours, and to the floor, beside it, which other peers' runs may have found faster or slower."""

BATCHES, TURNS = 4, 7
TURN_SECONDS, LEAST_STEPS, MOST_STEPS, MOST_SECONDS = 0.25, 3, 21, 45


def config_of(name: str, optimizer: str, extra: list[str]) -> RunConfig:
    """The run of a preset, the MLPs' optimizer going with the tables'."""
    preset, *changes = CONFIGS[name]
    dense = "sgd" if optimizer == "sgd" else "adagrad"
    flags.FLAGS.unparse_flags()
    arguments = [f"--flagfile={HERE / preset}.flags", "--id_skew=0", *changes, *extra]
    arguments += [f"--table_optimizer={optimizer}", f"--dense_optimizer={dense}"]
    if optimizer != "sgd":
        # With a tiny epsilon, Adagrad makes a whole step of what rounding left of a gradient that is 0.
        arguments += ["--learning_rate=0.01", "--adagrad_eps=1e-4"]
    flags.FLAGS(["compare_peers", *arguments])
    return config_from_flags()


def random_batches(config: RunConfig, placed: Placed) -> list[Batch]:
    """BATCHES different ones."""
    draw = jax.jit(device_batch, static_argnums=(0, 1, 2))
    spec = synthetic_spec(config.data)
    return [placed.put(draw(spec, config.seed, config.batch_size, i)) for i in range(BATCHES)]


def in_turns(sides: dict[str, Callable[[int], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of every counted step of each side; a side is given the number of the step."""
    steps = {}
    for name, step in sides.items():
        step(0)
        start = time.perf_counter()
        step(1)
        steps[name] = int(np.clip(TURN_SECONDS / (time.perf_counter() - start), LEAST_STEPS, MOST_STEPS))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + MOST_SECONDS
    for turn in range(turns):
        if turn > 1 and time.perf_counter() > end:
            break
        for name, step in sides.items():
            for i in range(steps[name]):
                start = time.perf_counter()
                step(i)
                if i:
                    taken[name].append(time.perf_counter() - start)
    return taken


def fits(model: ModelConfig, copies: int) -> str:
    """Why so many copies of the tables do not fit into the memory that is free; empty if they do."""
    need = copies * sum(4 * table.num_embeddings * table.embedding_dim for table in model.tables)
    if jax.default_backend() == "cpu":
        meminfo = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    else:
        import torch

        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    return "" if need < free else f"needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def peer_class(kind: str) -> Any:
    """Of a peer; its package is loaded now."""
    module, name, _ = PEERS[kind]
    return getattr(importlib.import_module(f"peers.{module}"), name)


def missing(kind: str) -> str:
    """Why a peer cannot be measured here; empty if it can."""
    if kind == "torchrec" and jax.default_backend() != "cpu":
        return "its kernels here are those for CPUs"
    try:
        peer_class(kind)
    except (ImportError, OSError) as error:  # OSError: FBGEMM's libraries are those of another PyTorch.
        return f"{error}; what to install stands at the top of {pathlib.Path(__file__).name}"
    return ""


def compare(name: str, optimizer: str, peers: list[str], extra: list[str], turns: int) -> dict[str, Any]:
    """All numbers of a configuration under one optimizer; for SGD the forward pass too."""
    config = config_of(name, optimizer, extra)
    report: dict[str, Any] = {kind: {} for kind in ((optimizer, FORWARD) if optimizer == "sgd" else (optimizer,))}
    for kind in peers:
        gc.collect()  # Or the tables of the last one are still there.
        what = f"{name}, {optimizer}, {SIDES[kind]}"
        if reason := fits(model_of(config), PEERS[kind][2]):
            print(f"{what}: left out: {reason}")
            continue
        try:
            differences, measured = compare_one(name, what, kind, config, list(report), turns)
        except UnequalError as error:
            print(f"left out: {error}", flush=True)
            continue
        for key, rows in measured.items():
            report[key] |= {way: row | {"differences": differences} for way, row in rows.items()}
    return report


def compare_one(
    name: str, what: str, kind: str, config: RunConfig, measured: list[str], turns: int
) -> tuple[dict[str, float], dict[str, dict]]:
    """(differences, rows by what is measured) of one peer; PyTorch's gives rows of the eager and the compiled way."""
    from peers.floor import floors

    placed = on_one_device(model_of(config), config.optimizer)
    batches = random_batches(config, placed)
    ours = Ours(placed, config.loss, config.seed)
    peer = peer_class(kind)(placed.model, config.optimizer, config.loss.name, ours.state)
    with jax.default_matmul_precision("highest"):
        differences = check_equal(what, ours, peer, batches)
    if kind == "torch":
        peer.compute_as_jax_does()
    theirs = [peer.batch(batch) for batch in batches]
    heap.keep_freed_temporaries()
    rows = {}
    for key in measured:
        step = "forward" if key == FORWARD else "train_step"
        sides = {"ours": stepping(getattr(ours, step), batches), kind: stepping(getattr(peer, step), theirs)}
        if jax.default_backend() == "cpu":  # On a GPU its launches would be most of it.
            sides["floor"] = floors(placed.model, ours.state.dense_params, batches[0])[key != FORWARD]
        if kind == "torch":
            sides["torch_compiled"] = stepping(functools.partial(getattr(peer, step), compiled=True), theirs)
        goals = {side: goal for (*of, side), goal in GOALS.get(jax.default_backend(), {}).items() if of == [name, key]}
        rows[key] = rows_of(in_turns(sides, turns), goals)
    return differences, rows


def stepping(step: Callable[[Any], Any], batches: list[Any]) -> Callable[[int], Any]:
    """The i-th step, with one batch after the other."""
    return lambda i: step(batches[i % len(batches)])


def main() -> None:
    """Compare, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=",".join(DEFAULT_CONFIGS), help="some of " + ", ".join(CONFIGS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--max_rows_per_table", type=int, default=0, help="cut tables, to fit this machine; 0: no")
    parser.add_argument("--json", type=pathlib.Path, help="where numbers go; those of other configurations stay there")
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--readme", action="store_true", help="renew the section of experiments/README.md")
    arguments = parser.parse_args()
    names, peers = arguments.configs.split(","), arguments.peers.split(",")
    for flag, given, known in (("configs", names, CONFIGS), ("peers", peers, PEERS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{flag}: {unknown[0]!r} is not known; choose of {', '.join(known)}")
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("PyTorch is missing; nothing is installed here: pip install torch")
    reasons = {kind: missing(kind) for kind in peers}
    for kind, reason in reasons.items():
        if reason:
            print(f"{SIDES[kind]} is left out: {reason}", flush=True)
    peers = [kind for kind, reason in reasons.items() if not reason]
    gpu_atomics.use_hardware_additions()
    define_run_flags()
    extra = [f"--max_rows_per_table={arguments.max_rows_per_table}"] if arguments.max_rows_per_table else []
    results = json.loads(arguments.json.read_text())["configs"] if arguments.json and arguments.json.exists() else {}
    used = versions() | peers_versions(peers)
    for name in names:
        found: dict[str, Any] = {}
        for optimizer in arguments.optimizers.split(","):
            found |= compare(name, optimizer, peers, extra, arguments.turns)
        print(table({name: found}), flush=True)
        results = {other: (results | {name: found})[other] for other in CONFIGS if other in results or other == name}
        if arguments.json:
            write_json_atomically(arguments.json, {"configs": results, "versions": used})
    if arguments.picture:
        draw(results, arguments.picture)
    if arguments.readme:
        replace_section(HERE / "README.md", "peers", section(results, used, arguments.turns))


def peers_versions(peers: list[str]) -> dict[str, str]:
    """Of the packages that the peers are made of."""
    packages = ("torch", *(("torchrec", "fbgemm_gpu") if "torchrec" in peers else ()))
    return {package: importlib.import_module(package).__version__ for package in packages}


def section(results: dict[str, dict], used: dict[str, str | None], turns: int) -> str:
    """What experiments/README.md shows of some results, and of how they were measured."""
    command = f"python experiments/compare_peers.py --configs={','.join(results)}"
    command += f" --turns={turns}" if turns != TURNS else ""
    tables = f"{table(results)}\n\n{FLOOR_TEXT}\n\n{floor_table(results)}"
    packages = "".join(f", {name} {used[name]}" for name in ("torch", "torchrec", "fbgemm_gpu") if name in used)
    return f"{tables}\n\nMeasured {where_and_when(used)}{packages}; `{command}`."


if __name__ == "__main__":
    main()
