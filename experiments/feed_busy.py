"""How busy the loop keeps a fast device: `python experiments/feed_busy.py [--rows=2000000] [--before=CHECKOUT]`.

The device is simulated: a step that sleeps (0.25 ms by default) and touches its batch, so that both cores are free to
feed it. Everything else, prepared data, windows, dispatch, records, is the run's own. Of each batch size: the share of
the time that the device worked, from its first step to its last, and rows a second.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from criteo_text import write
from measure import ROOT, replace_section, where_and_when

from dlrm_jax.config import LossConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.data.infer.choose import choose_schema
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.training import loop, stepper
from dlrm_jax.training.reporting import versions
from dlrm_jax.training.run_config import ModelOptions, RunConfig


class Device:
    """Sleeps for each step, one after the other, and knows when it did."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.worked, self.first, self.last, self.steps = seconds, 0.0, 0.0, 0.0, 0

    def work(self, step: np.ndarray, total: np.ndarray) -> np.ndarray:
        """One step."""
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.last = time.perf_counter()
        self.first, self.steps = self.first or start, self.steps + 1
        self.worked += self.last - start
        return np.float32(0.5) + 0 * total + 0 * np.float32(step)

    def make_step(self, *settings: object) -> object:
        """In place of step.make_train_step."""
        del settings

        def step(state, batch):
            touched = batch.dense_BxN.sum() + batch.ids_BxK.sum() + batch.label_B.sum() + batch.weight_B.sum()
            scalar = jax.ShapeDtypeStruct((), "float32")
            loss = jax.pure_callback(self.work, scalar, state.step, touched)
            # The next step waits for this one, as a real one would for the weights.
            done = jnp.where(jnp.isnan(loss), 0, 1).astype(jnp.int32)
            metrics = {"loss": loss, "learning_rate": jnp.float32(0.1), "finite": jnp.isfinite(loss)}
            return state.replace(step=state.step + done), metrics

        return step


def share_busy(
    dataset: pathlib.Path, batch_size: int, seconds: float, steps: int, on_device: str
) -> tuple[float, float]:
    """(share of the time that the device worked, rows a second)."""
    config = RunConfig(
        data=DataConfig(data_dir=str(dataset)),
        model=ModelOptions(embedding_dim=1, bottom_mlp=(1,), top_mlp=(1,)),
        loss=LossConfig(),
        optimizer=OptimizerConfig(dense="sgd", table="sgd", schedule=ScheduleConfig(learning_rate=0.1)),
        batch_size=batch_size,
        num_steps=steps,
        eval_every=steps,
        log_every=100,
        **({"data_on_device": on_device} if on_device else {}),
    )
    device = Device(seconds)
    stepper.make_train_step = device.make_step
    with tempfile.TemporaryDirectory() as workdir:
        loop.train_and_evaluate(config, pathlib.Path(workdir))
    elapsed = device.last - device.first
    return device.worked / elapsed, batch_size * (device.steps - 1) / elapsed


def measured(flags: argparse.Namespace, dataset: pathlib.Path, checkout: str) -> dict[int, tuple[float, float]]:
    """`share_busy` by batch size, of the package in `checkout`, in a process of its own."""
    command = [sys.executable, __file__, f"--dataset={dataset}", f"--batch_sizes={flags.batch_sizes}", "--alone"]
    command += [f"--steps={flags.steps}", f"--milliseconds={flags.milliseconds}"]
    environment = os.environ | {"PYTHONPATH": checkout}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return {int(size): tuple(pair) for size, pair in json.loads(done.stdout.splitlines()[-1]).items()}


def alone(flags: argparse.Namespace) -> None:
    """This process's package, as JSON."""
    on_device = "never" if "data_on_device" in RunConfig.__dataclass_fields__ else ""
    sizes = map(int, flags.batch_sizes.split(","))
    dataset, seconds = pathlib.Path(flags.dataset), flags.milliseconds / 1e3
    print(json.dumps({size: share_busy(dataset, size, seconds, flags.steps, on_device) for size in sizes}))


def main() -> None:
    """Prepare, run each version in turn, and write the table between the `<!-- feeding -->` marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch_sizes", default="512,2048,8192")
    parser.add_argument("--milliseconds", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dataset", default="", help="prepared already")
    parser.add_argument("--before", default="", help="a checkout of an older version, measured in turn")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.alone:
        return alone(flags)
    checkouts = {"before": flags.before} if flags.before else {}
    found: dict[str, list[dict[int, tuple[float, float]]]] = {name: [] for name in (*checkouts, "now")}
    with tempfile.TemporaryDirectory() as name:
        dataset = pathlib.Path(flags.dataset or f"{name}/data")
        if not flags.dataset:
            log = f"{name}/log.txt"
            write(log, flags.rows)
            prepare((log,), dataset, choose_schema("criteo_kaggle_hash", (log,)))
        for _ in range(flags.turns):
            for version in found:
                found[version].append(measured(flags, dataset, checkouts.get(version, str(ROOT))))
    lines = ["| batch | version | the device works | M rows/s |", "|---|---|---|---|"]
    for size in map(int, flags.batch_sizes.split(",")):
        for version, turns in found.items():
            busy, rate = (np.median([turn[size][i] for turn in turns]) for i in (0, 1))
            lines.append(f"| {size:,} | {version} | {busy:.1%} | {rate / 1e6:.2f} |")
    text = "\n".join(lines)
    print(text)
    where = where_and_when(versions()) + f" Medians of {flags.turns} turns, steps of {flags.milliseconds} ms."
    replace_section(ROOT / "experiments" / "README.md", "feeding", f"{where}\n\n{text}")
    return None


if __name__ == "__main__":
    main()
