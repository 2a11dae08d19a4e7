"""Criteo Kaggle's 34 M rows against tables capped at 10,000: memory, time, and a dense-gradient step beside ours.

`python experiments/row_free.py [--json] [--steps=N] [--skip_dense]` prints the table of experiments/README.md.
Both sides run alternately in one process; times are medians.
"""

import argparse
import json
import pathlib
import resource
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dlrm_jax.config import FeatureConfig, LossConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TableConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.host import heap
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.model.loss import example_losses
from dlrm_jax.tables.exchange import local_ops
from dlrm_jax.training.state import init_state
from dlrm_jax.training.step import make_train_step

KAGGLE_ROWS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652),
    *(2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
BATCH_SIZE = 2048
DENSE_STEPS = 3


def kaggle_model(max_rows: int = 2**31 - 1) -> ModelConfig:
    """The reference's Criteo Kaggle model, with tables capped at `max_rows`."""
    names = [f"C{i}" for i in range(1, 27)]
    return ModelConfig(
        num_dense=13,
        tables=tuple(TableConfig(n, min(rows, max_rows), 16) for n, rows in zip(names, KAGGLE_ROWS, strict=True)),
        features=tuple(FeatureConfig(name, name) for name in names),
        bottom_mlp=(512, 256, 64, 16),
        top_mlp=(512, 256, 1),
    )


def uniform_batch(model: ModelConfig, seed: int) -> Batch:
    """Ids uniform over each table: the least cache-friendly case."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, table.num_embeddings, BATCH_SIZE) for table in model.tables]
    return jax.device_put(
        Batch(
            dense_BxN=rng.random((BATCH_SIZE, 13), np.float32),
            ids_BxK=np.stack(ids, axis=1).astype(np.int32),
            label_B=(rng.random(BATCH_SIZE) < 0.3).astype(np.float32),
            weight_B=np.ones(BATCH_SIZE, np.float32),
        )
    )


def dense_gradient_step(model: ModelConfig, rate: float) -> Any:
    """SGD by autodiff through the tables: what a plain Flax program does, every row of every table in every step."""

    def loss(params: dict, batch: Batch) -> jax.Array:
        ops = local_ops(model)
        pooled, _ = ops.lookup(params["tables"], ops.route(batch.ids_BxK, None))
        logits = DLRM(model).apply({"params": params["dense"]}, batch.dense_BxN, pooled)
        return example_losses(LossConfig(), logits, batch.label_B).mean()

    def step(params: dict, batch: Batch) -> dict:
        return jax.tree.map(lambda w, g: w - rate * g, params, jax.grad(loss)(params, batch))

    return jax.jit(step, donate_argnums=0)


class PeakMemory:
    """Highest resident memory, in bytes above the start, while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self._start, self.bytes, self._done = self._resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, self._resident() - self._start)

    @staticmethod
    def _resident() -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_init() -> dict[str, float]:
    """Seconds and peak memory, relative to the tables' bytes, of a state's birth."""
    jax.block_until_ready(jax.numpy.ones(1) + 1)
    with PeakMemory() as peak:
        start = time.perf_counter()
        state = jax.block_until_ready(init_state(kaggle_model(), optimizer("sgd"), 0))
        seconds = time.perf_counter() - start
    table_bytes = sum(table.nbytes for table in state.tables.values())
    return {"init_seconds": seconds, "init_peak_ratio": peak.bytes / table_bytes, "table_bytes": table_bytes}


def optimizer(name: str) -> OptimizerConfig:
    """The same rate and matching dense optimizer for each table optimizer."""
    return OptimizerConfig(ScheduleConfig(0.1), dense="sgd" if name == "sgd" else "adagrad", table=name)


def measure_rows(name: str, steps: int) -> dict[str, float]:
    """Median step at full size and capped, alternately, and the full step's temporary memory."""
    sides: list[dict[str, Any]] = []
    for max_rows in (2**31 - 1, 10_000):
        model = kaggle_model(max_rows)
        state, batch = init_state(model, optimizer(name), 0), uniform_batch(model, 0)
        step = jax.jit(make_train_step(model, LossConfig(), optimizer(name)), donate_argnums=0)
        compiled = step.lower(state, batch).compile()
        sides.append({"step": compiled, "state": state, "batch": batch, "seconds": []})
    heap.keep_freed_temporaries()  # As a run does.
    for i in range(steps + 2):
        for side in sides:
            start = time.perf_counter()
            side["state"], _ = jax.block_until_ready(side["step"](side["state"], side["batch"]))
            if i >= 2:
                side["seconds"].append(time.perf_counter() - start)
    full, capped = (float(np.median(side["seconds"])) for side in sides)
    temp_bytes = sides[0]["step"].memory_analysis().temp_size_in_bytes
    return {"temp_bytes": temp_bytes, "full_ms": full * 1e3, "capped_ms": capped * 1e3, "ratio": full / capped}


def measure_dense() -> dict[str, float]:
    """Ten SGD steps of both kinds from the same weights: worst weight difference and ratio of median step times."""
    model, seconds = kaggle_model(), {"sparse": [], "dense": []}
    ours = init_state(model, optimizer("sgd"), 0)
    copy = init_state(model, optimizer("sgd"), 0)
    params = {"dense": copy.dense_params, "tables": copy.tables}
    sparse_step = jax.jit(make_train_step(model, LossConfig(), optimizer("sgd")), donate_argnums=0)
    dense_step = dense_gradient_step(model, 0.1)
    heap.keep_freed_temporaries()
    for i in range(10):
        batch = uniform_batch(model, i)
        start = time.perf_counter()
        ours, _ = jax.block_until_ready(sparse_step(ours, batch))
        middle = time.perf_counter()
        params = jax.block_until_ready(dense_step(params, batch))
        seconds["sparse"].append(middle - start)
        seconds["dense"].append(time.perf_counter() - middle)
    worst = jax.tree.map(
        lambda a, b: float(jax.numpy.abs(a - b).max()), {"dense": ours.dense_params, "tables": ours.tables}, params
    )
    sparse, dense = (float(np.median(seconds[side][2:])) for side in ("sparse", "dense"))
    return {
        "sparse_ms": sparse * 1e3,
        "dense_ms": dense * 1e3,
        "ratio": dense / sparse,
        "weight_diff": max(jax.tree.leaves(worst)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--skip_dense", action="store_true", help="leave out the dense-gradient step (needs 7 GiB)")
    flags = parser.parse_args()
    report: dict[str, Any] = measure_init()
    for name in ("sgd", "rowwise_adagrad"):
        report[name] = measure_rows(name, flags.steps)
    if not flags.skip_dense:
        report["dense_gradient"] = measure_dense()
    if flags.json:
        print(json.dumps(report))
        return
    print(
        f"tables {report['table_bytes'] / 1e9:.2f} GB; init {report['init_seconds']:.1f} s, "
        f"peak {report['init_peak_ratio']:.2f}x the tables"
    )
    for name in ("sgd", "rowwise_adagrad"):
        row = report[name]
        print(
            f"{name}: temporaries {row['temp_bytes'] / 1e6:.1f} MB, {row['full_ms']:.1f} ms a step at 34 M rows, "
            f"{row['capped_ms']:.1f} ms capped at 10,000 rows a table, ratio {row['ratio']:.2f}"
        )
    if not flags.skip_dense:
        row = report["dense_gradient"]
        print(
            f"dense gradient: {row['dense_ms']:.0f} ms against {row['sparse_ms']:.1f} ms, {row['ratio']:.0f}x; "
            f"worst weight difference after 10 steps {row['weight_diff']:.1e}"
        )


if __name__ == "__main__":
    main()
