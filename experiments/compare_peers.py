"""Ours beside what a user would pick instead: PyTorch (eager, compiled), and JAX with dense gradients through optax.

    pip install ".[peers]" && python experiments/compare_peers.py \
        [--configs=kaggle_b128,kaggle_b2048,synthetic,rm1,rm2] [--json=FILE] [--picture=FILE] [--readme]

Ours is measured twice: as it is by default, and with --kernels=native, where the machine has a C++ compiler. Both
find their tables on huge pages, as a run of ours puts them; the peers' lie as their own library puts them. The process
keeps what it frees, as a run of ours has it, whichever side freed it.
All sides work where JAX does, on the CPU or the first GPU. Each peer starts from our weights, and must have our logits
before, and our logits and weights after some steps, in full float32; times are in TF32 on a GPU, on all sides. Then all
step in turn in one process, a turn being some steps on end, of which the first is not counted; times are medians. Ids
are uniform over each table, batches ready in memory. `--readme` renews the tables of experiments/README.md.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
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
from peers.report import GOALS, SIDES, draw, floor_table, rows_of, table

from dlrm_jax.api.planning import model_of
from dlrm_jax.cli.flags import config_from_flags, define_run_flags
from dlrm_jax.config import ModelConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.generate.synthetic import device_batch
from dlrm_jax.data.read.load import synthetic_spec
from dlrm_jax.host import gpu_atomics, heap
from dlrm_jax.host.formulations import AUTO, NATIVE
from dlrm_jax.host.native_code import has_compiler
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.reporting import versions, write_json_atomically
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.step import logits, make_train_step

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
OPTIMIZERS = ("sgd", "rowwise_adagrad")
FORWARD = "forward"
FLOOR_TEXT = """\
The floor (`peers/floor.py`) is what XLA takes here for the MLPs' float32 products, and for reading and writing as many
bytes as the rows have, in order, each by itself: a step made of these cannot be faster. A peer's step over it, in bold,
is how many times as fast as that peer such a step is at most. All ratios are those of turns taken together: a peer's
are to ours, and to the floor, beside it, which other peers' runs may have found faster or slower."""

BATCHES, STEPS_CHECKED, TURNS = 4, 3, 7
LOGIT_TOLERANCE, WEIGHT_TOLERANCE = 2e-4, 2e-5
TURN_SECONDS, LEAST_STEPS, MOST_STEPS, MOST_SECONDS = 0.25, 3, 21, 45


class Ours:
    """Our own step as a run compiles it, by each of `kernels`, which work on one state."""

    def __init__(self, config: RunConfig, placed: Placed) -> None:
        self.model, self.state = placed.model, placed.init_state(config.seed)
        self.kernels = (AUTO, NATIVE) if has_compiler() and jax.default_backend() == "cpu" else (AUTO,)
        self._steps, self._forwards = {}, {}
        for kernels in self.kernels:
            ops = dataclasses.replace(placed, kernels=kernels).ops
            step = make_train_step(placed.model, config.loss, config.optimizer, 1, ops)
            self._steps[kernels] = placed.jit_step(step)
            self._forwards[kernels] = jax.jit(functools.partial(logits, placed.model, ops=ops))

    def forward(self, batch: Batch, kernels: str = AUTO) -> jax.Array:
        """logits_B."""
        return jax.block_until_ready(self._forwards[kernels](self.state, batch))

    def train_step(self, batch: Batch, kernels: str = AUTO) -> float:
        """One update of everything; returns the loss."""
        self.state, metrics = jax.block_until_ready(self._steps[kernels](self.state, batch))
        return float(metrics["loss"])

    def tables(self) -> Iterator[np.ndarray]:
        """The tables' weights, in the model's order."""
        return (np.asarray(rows) for _, rows in named_tables(self.model, self.state.tables))

    def dense_weights(self) -> dict[str, list[np.ndarray]]:
        """(in, out) kernels and biases, in order, by MLP."""
        return {
            part: [
                np.asarray(self.state.dense_params[part][f"layer_{i}"][name])
                for i in range(len(self.state.dense_params[part]))
                for name in ("kernel", "bias")
            ]
            for part in ("bottom_mlp", "top_mlp")
        }


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


def largest_difference(ours: Ours, peer: Any) -> float:
    """Between two sides' weights, all of them."""
    mine, theirs = ours.dense_weights(), peer.dense_weights()
    pairs = [pair for part in mine for pair in zip(mine[part], theirs[part], strict=True)]
    worst = max(float(np.abs(a - b).max()) for a, b in pairs)
    return max([worst, *(float(np.abs(a - b).max()) for a, b in zip(ours.tables(), peer.tables(), strict=True))])


def check_equal(what: str, ours: Ours, peer: Any, batches: list[Batch]) -> dict[str, float]:
    """Largest differences of logits before and after some steps and of weights after; exits where they are large."""

    def of_logits() -> float:
        theirs = peer.host(peer.forward(peer.batch(batches[0])))
        mine = [np.asarray(ours.forward(batches[0], kernels)) for kernels in ours.kernels]
        return max(float(np.abs(a - theirs).max() / max(1.0, np.abs(a).max())) for a in mine)

    found = {"logits_before": of_logits()}
    for i, batch in enumerate(batches[:STEPS_CHECKED]):
        ours.train_step(batch, ours.kernels[-1 - i % len(ours.kernels)])  # In turn, native first.
        peer.train_step(peer.batch(batch))
    found |= {"logits_after": of_logits(), "weights_after": largest_difference(ours, peer)}
    print(f"{what}: " + ", ".join(f"{name} differ by {value:.1e}" for name, value in found.items()), flush=True)
    if (
        max(found["logits_before"], found["logits_after"]) > LOGIT_TOLERANCE
        or found["weights_after"] > WEIGHT_TOLERANCE
    ):
        raise SystemExit(f"{what} is not equal to ours: {found}")
    return found


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


def compare(name: str, optimizer: str, peers: list[str], extra: list[str], turns: int) -> dict[str, Any]:
    """All numbers of a configuration under one optimizer; for SGD the forward pass too."""
    config = config_of(name, optimizer, extra)
    report: dict[str, Any] = {kind: {} for kind in ((optimizer, FORWARD) if optimizer == "sgd" else (optimizer,))}
    for kind in peers:
        copies = {"torch": 3, "dense_jax": 4}[kind]
        gc.collect()  # Or the tables of the last one are still there.
        what = f"{name}, {optimizer}, {SIDES[kind]}"
        if reason := fits(model_of(config), copies):
            print(f"{what}: left out: {reason}")
            continue
        differences, measured = compare_one(name, what, kind, config, list(report), turns)
        for key, rows in measured.items():
            report[key] |= {way: row | {"differences": differences} for way, row in rows.items()}
    return report


def compare_one(
    name: str, what: str, kind: str, config: RunConfig, measured: list[str], turns: int
) -> tuple[dict[str, float], dict[str, dict]]:
    """(differences, rows by what is measured) of one peer; PyTorch's gives rows of the eager and the compiled way."""
    from peers.dense_jax import DenseJax
    from peers.floor import floors
    from peers.torch_dlrm import TorchDLRM

    placed = on_one_device(model_of(config), config.optimizer)
    batches = random_batches(config, placed)
    ours = Ours(config, placed)
    peer_class = TorchDLRM if kind == "torch" else DenseJax
    peer: Any = peer_class(placed.model, config.optimizer, config.loss.name, ours.state)
    with jax.default_matmul_precision("highest"):
        differences = check_equal(what, ours, peer, batches)
    if isinstance(peer, TorchDLRM):
        peer.compute_as_jax_does()
    theirs = [peer.batch(batch) for batch in batches]
    heap.keep_freed_temporaries()
    rows = {}
    for key in measured:
        step = "forward" if key == FORWARD else "train_step"
        sides = {"ours": stepping(getattr(ours, step), batches), kind: stepping(getattr(peer, step), theirs)}
        if jax.default_backend() == "cpu":  # On a GPU its launches would be most of it.
            sides["floor"] = floors(placed.model, ours.state.dense_params, batches[0])[key != FORWARD]
        if NATIVE in ours.kernels:
            sides["native"] = stepping(functools.partial(getattr(ours, step), kernels=NATIVE), batches)
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
    parser.add_argument("--peers", default="torch,dense_jax")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--max_rows_per_table", type=int, default=0, help="cut tables, to fit this machine; 0: no")
    parser.add_argument("--json", type=pathlib.Path, help="where numbers go; those of other configurations stay there")
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--readme", action="store_true", help="renew the section of experiments/README.md")
    arguments = parser.parse_args()
    names = arguments.configs.split(",")
    if unknown := sorted(set(names) - set(CONFIGS)):
        parser.error(f"--configs: {unknown[0]!r} is not known; choose of {', '.join(CONFIGS)}")
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("PyTorch is missing; nothing is installed here: pip install torch")
    gpu_atomics.use_hardware_additions()
    define_run_flags()
    extra = [f"--max_rows_per_table={arguments.max_rows_per_table}"] if arguments.max_rows_per_table else []
    results: dict[str, dict] = {name: {} for name in names}
    kept = json.loads(arguments.json.read_text())["configs"] if arguments.json and arguments.json.exists() else {}
    for name in names:
        for optimizer in arguments.optimizers.split(","):
            results[name] |= compare(name, optimizer, arguments.peers.split(","), extra, arguments.turns)
        print(table({name: results[name]}), flush=True)
    import torch

    used = versions() | {"torch": torch.__version__}
    results = {name: (kept | results)[name] for name in CONFIGS if name in kept | results}
    if arguments.json:
        write_json_atomically(arguments.json, {"configs": results, "versions": used})
    if arguments.picture:
        draw(results, arguments.picture)
    if arguments.readme:
        replace_section(HERE / "README.md", "peers", section(results, used, arguments.turns))


def section(results: dict[str, dict], used: dict[str, str | None], turns: int) -> str:
    """What experiments/README.md shows of some results, and of how they were measured."""
    command = f"python experiments/compare_peers.py --configs={','.join(results)}"
    command += f" --turns={turns}" if turns != TURNS else ""
    tables = f"{table(results)}\n\n{FLOOR_TEXT}\n\n{floor_table(results)}"
    return f"{tables}\n\nMeasured {where_and_when(used)}, torch {used['torch']}; `{command}`."


if __name__ == "__main__":
    main()
