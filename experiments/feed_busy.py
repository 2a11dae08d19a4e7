"""How busy the loop keeps a fast device: `python experiments/feed_busy.py [--rows=2000000] [--batch_sizes=2048]`.

The device is simulated: a step that sleeps (0.25 ms by default) and touches its batch, so that both cores are free to
feed it. Everything else, prepared data, windows, dispatch, records, is the run's own. Prints for each batch size the
share of the time that the device worked, from its first step to its last, and rows a second.
"""

import argparse
import functools
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from criteo_text import write

from dlrm_jax.config import LossConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.data.infer.choose import choose_schema
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.training import loop, stepper
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


def main() -> None:
    """Prepare, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch_sizes", default="2048")
    parser.add_argument("--milliseconds", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--data_on_device", default="never", help="auto, never, always; empty for older versions")
    parser.add_argument("--dataset", default="", help="prepared already")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dataset = pathlib.Path(flags.dataset or name) / ("" if flags.dataset else "data")
        if not flags.dataset:
            log = pathlib.Path(name) / "log.txt"
            write(str(log), flags.rows)
            prepare((str(log),), dataset, choose_schema("criteo_kaggle_hash", (str(log),)))
        measure = functools.partial(share_busy, dataset, seconds=flags.milliseconds / 1e3, steps=flags.steps)
        for batch_size in map(int, flags.batch_sizes.split(",")):
            busy, rate = measure(batch_size, on_device=flags.data_on_device)
            print(
                f"batch {batch_size:,}: the device works {busy:.1%} of the time, {rate / 1e6:.2f} M rows/s", flush=True
            )


if __name__ == "__main__":
    main()
