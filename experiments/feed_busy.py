"""How busy the loop keeps a fast device: `python experiments/feed_busy.py [--rows=2000000] [--before=CHECKOUT]`.

The device is simulated: a thread that sleeps for each step (0.25 ms by default) and touches what it was given, so that
both cores are free to feed it. Everything else, prepared data, windows, the loop, records, is the run's own. Of each
batch size: the share of the time that the device worked, from its first step to its last, and rows a second. A sleep
lasts longer than asked, 0.3 ms alone and more beside busy threads; all of it counts as work.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
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
from dlrm_jax.training.state import TrainState


class Device:
    """A thread that works off steps in their order: sleeps, touches the batch, and knows when it did.

    It stands in for `Stepper._compiled`, so that nothing of a step runs on the CPU. `ahead` steps may wait for it, as
    in a real device's queue; who wants a step's metrics waits until it is done.
    """

    def __init__(self, seconds: float, ahead: int = 128) -> None:
        self.seconds, self.worked, self.first, self.last, self.steps, self.touched = seconds, 0.0, 0.0, 0.0, 0, 0.0
        self._queue: queue.Queue[tuple[object, threading.Event]] = queue.Queue(ahead)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            batch, done = self._queue.get()
            start = time.perf_counter()
            time.sleep(self.seconds)
            self.touched += sum(float(np.asarray(leaf).flat[0]) for leaf in jax.tree.leaves(batch))
            self.last = time.perf_counter()
            self.first, self.steps = self.first or start, self.steps + 1
            self.worked += self.last - start
            done.set()

    def take(self, stepper: object, name: str, step: object, state: TrainState, *arguments: object) -> tuple:
        """In place of Stepper._compiled, of today's steps (record, window) and of those of before (batch)."""
        del stepper, name, step
        done = threading.Event()
        self._queue.put((arguments[-1], done))
        state = state.replace(step=Later(done, int(state.step) + 1))
        if len(arguments) == 1:
            return state, {"loss": Later(done, 0.5), "learning_rate": 0.1, "finite": Later(done, True)}
        return state, Records(done, np.asarray(arguments[0]).shape)


class Later:
    """A number on the simulated device."""

    def __init__(self, done: threading.Event, value: float) -> None:
        self._done, self._value = done, value

    def is_ready(self) -> bool:
        """As jax.Array has it."""
        return self._done.is_set()

    def block_until_ready(self) -> "Later":
        """As jax.Array has it."""
        self._done.wait()
        return self

    def __int__(self) -> int:
        return int(self._value)

    def __float__(self) -> float:
        return float(self.block_until_ready()._value)

    def __bool__(self) -> bool:
        return bool(self.block_until_ready()._value)


class Records(Later):
    """A window's record on the simulated device: loss, rate, whether finite, no exchange."""

    def __init__(self, done: threading.Event, shape: tuple[int, int]) -> None:
        super().__init__(done, 0.0)
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        del dtype, copy
        return np.tile(np.float32([0.5, 0.1, 1.0, np.nan]), (self.shape[0], 1))

    def copy_to_host_async(self) -> None:
        """As jax.Array has it."""

    def addressable_data(self, index: int) -> np.ndarray:
        """As jax.Array has it."""
        del index
        return np.asarray(self.block_until_ready())


class Measured(Exception):
    """The steps are done: what comes behind them is no part of the measurement."""


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
        checkpoint_every=steps,
        log_every=100,
        **({"data_on_device": on_device} if on_device else {}),
    )
    device = Device(seconds)
    stepper.Stepper._compiled = functools.partialmethod(lambda *args: device.take(*args))
    ended = mock.patch.object(loop, "evaluate_progress", side_effect=Measured)
    with tempfile.TemporaryDirectory() as workdir, ended, contextlib.suppress(Measured):
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
    lines = ["| batch | version | the device works | M rows/s | ms a step |", "|---|---|---|---|---|"]
    for size in map(int, flags.batch_sizes.split(",")):
        for version, turns in found.items():
            busy, rate = (np.median([turn[size][i] for turn in turns]) for i in (0, 1))
            lines.append(f"| {size:,} | {version} | {busy:.1%} | {rate / 1e6:.2f} | {size / rate * 1e3:.2f} |")
    text = "\n".join(lines)
    print(text)
    where = f"{where_and_when(versions())}. Medians of {flags.turns} turns, sleeps of {flags.milliseconds} ms."
    replace_section(ROOT / "experiments" / "README.md", "feeding", f"{where}\n\n{text}")
    return None


if __name__ == "__main__":
    main()
