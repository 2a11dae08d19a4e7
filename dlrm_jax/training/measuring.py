"""A run's step and forward pass, measured: compile time, step time by parts, work against the hardware, memory."""

import dataclasses
import functools
import itertools
import pathlib
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dlrm_jax.data.read.pipeline import Cut, Prefetcher
from dlrm_jax.host import heap
from dlrm_jax.host.memory import held_by
from dlrm_jax.planning.cost import estimate, forward_work
from dlrm_jax.planning.hardware import Hardware
from dlrm_jax.training import step_parts
from dlrm_jax.training.feed import Feed, Window, make_feed
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.placement import failing_in_one_line, setting_of
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import logits, make_train_step
from dlrm_jax.training.stepper import Stepper
from dlrm_jax.training.window_step import make_window_step

TRAIN, FORWARD, INPUT = "train", "forward", "input"
_BATCHES, _WARM_STEPS, _LEAST_STEPS, _MOST_DISPATCHED, _TRACED_STEPS = 4, 2, 5, 200, 5
_ROUND_SECONDS = 0.1


def measure(
    config: RunConfig,
    seconds: float,
    hardware: Hardware | None = None,
    parts: bool = True,
    workdir: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Numbers of `train`, `forward` and `input`, as JSON has them; each is repeated for `seconds`.

    `hardware` is what the work is held against, by default the table's entry for the device at hand. Times are in
    seconds, memory and traffic in bytes of the device that has most, `samples_per_second` of all devices together.
    """
    placed, feed, window, input_numbers = _placed_windows(config, seconds, workdir)
    setting = setting_of(config, placed.model, placed.plan.mesh)
    hardware = hardware or setting.hardware
    cost = estimate(placed.model, config.optimizer, placed.plan, setting.load, hardware, placed.options)
    work = {
        TRAIN: (cost.flops, cost.traffic, cost.seconds),
        FORWARD: forward_work(placed.model, placed.stacks, setting.load, hardware),
    }
    with failing_in_one_line(config, placed):
        numbers = {INPUT: input_numbers} | _passes(config, placed, feed, window, seconds, parts)
    for kind, (flops, traffic, predicted) in work.items():
        numbers[kind] |= _against(hardware, flops, traffic, predicted, numbers[kind]["step_seconds"])
        numbers[kind]["samples_per_second"] = config.batch_size / numbers[kind]["step_seconds"]
    return numbers | {
        "batch_size": config.batch_size,
        "devices": placed.num_devices,
        "hardware": dataclasses.asdict(hardware),
        "peak_bytes": peak_bytes(),
    }


def _placed_windows(
    config: RunConfig, seconds: float, workdir: pathlib.Path | None
) -> tuple[Placed, Feed, Window, dict[str, float]]:
    """(the run's model where it lies, its feed, a window on the devices, how long the input takes for a batch).

    Rows travel, whichever way a run's would get there.
    """
    opened = open_run(config, workdir)
    placed = opened.place()
    cut = Cut(config.batch_size, multiple=placed.num_devices * config.num_micro_batches)
    most = max(_BATCHES, config.steps_per_dispatch)
    feed = make_feed(placed, opened.dataset, opened.dataset.splits["train"], cut, most_steps=most)
    with feed.train_windows(config.seed, 0, config.shuffle) as windows:
        _, window = next(windows)
        start = time.perf_counter()
        end, count = start + min(seconds, 2.0), 0
        while count < _LEAST_STEPS or time.perf_counter() < end:
            jax.block_until_ready(next(windows)[1])
            count += feed.cut.steps
        return placed, feed, window, {"step_seconds": (time.perf_counter() - start) / count}


def _passes(
    config: RunConfig, placed: Placed, feed: Feed, window: Window, seconds: float, parts: bool
) -> dict[str, dict[str, Any]]:
    """The measured numbers of both passes."""
    held, done = [placed.init_state(config.seed)], 0
    heap.keep_freed_temporaries()  # As a run does.
    score = jax.jit(
        lambda state, window, step: logits(placed.model, state, feed.batch(window, step), placed.ops),
        in_shardings=(placed.shardings, feed.shardings, None),
    )
    start = time.perf_counter()
    forward = score.lower(held[0], window, np.int32(0)).compile()
    forward_compile = time.perf_counter() - start
    scored = functools.partial(lambda executable, i: executable(held[0], window, np.int32(i)), forward)
    with Prefetcher(itertools.repeat(np.zeros(0)), lambda _: window) as windows:
        stepper = Stepper(config, placed, feed, windows)

        def train(i: int) -> Any:
            nonlocal done
            del i  # The stepper takes the batches in turn.
            taken, held[0] = stepper(held[0], done, stepper.at_once)
            done += taken
            return held[0].step

        jax.block_until_ready(train(0))
        trained = _timed(train, stepper.executable, seconds, stepper.at_once)
        numbers: dict[str, dict[str, Any]] = {
            TRAIN: {"compile_seconds": stepper.compile_seconds} | trained,
            FORWARD: {"compile_seconds": forward_compile} | _timed(scored, forward, seconds),
        }
        if parts:
            traced: list[tuple[Callable[[int], Any], Any]] = [(train, stepper.executable), (scored, forward)]
            if options := step_parts.TRACED_OPTIONS.get(jax.default_backend()):
                traced = _traced(config, placed, feed, window, held, stepper.record.values_TxM, score, options)
            for kind, one in zip((TRAIN, FORWARD), traced, strict=True):
                numbers[kind]["parts"] = _shares(*one)
    return numbers


def _traced(
    config: RunConfig,
    placed: Placed,
    feed: Feed,
    window: Window,
    held: list[TrainState],
    record_TxM: jax.Array,
    score: Any,
    options: dict[str, Any],
) -> list[tuple[Callable[[int], Any], Any]]:
    """(call, program) of both passes, compiled by `options` under which the profiler sees their parts."""
    settings = (placed.model, config.loss, config.optimizer, config.num_micro_batches, placed.ops, config.seed)
    step = placed.jit_window_step(make_window_step(make_train_step(*settings), feed), feed.shardings)
    train = step.lower(held[0], record_TxM, window).compile(compiler_options=options)
    forward = score.lower(held[0], window, np.int32(0)).compile(compiler_options=options)
    records = [record_TxM]

    def stepping(i: int) -> Any:
        del i
        held[0], records[0] = train(held[0], records[0], window)
        return held[0].step

    return [(stepping, train), (lambda i: forward(held[0], window, np.int32(i)), forward)]


def _timed(call: Callable[[int], Any], executable: Any, seconds: float, at_once: int = 1) -> dict[str, Any]:
    """A step's time, `at_once` a call, waited for and dispatched back to back; what it holds by XLA's account.

    A device that knows its next steps, as in a run, does not wait for the host between them.
    """

    def rounds(calls: int) -> list[float]:
        """Seconds a step, of rounds of so many calls, each waited for, for half of the time."""
        taken: list[float] = []
        end = time.perf_counter() + seconds / 2
        while len(taken) * calls < _LEAST_STEPS or time.perf_counter() < end:
            start = time.perf_counter()
            last = [call(i) for i in range(calls)][-1]
            jax.block_until_ready(last)
            taken.append((time.perf_counter() - start) / (calls * at_once))
        return taken

    for i in range(_WARM_STEPS):
        jax.block_until_ready(call(i))
    waited = rounds(1)
    # In rounds so long that waiting for their last step does not count. On CPUs one by one: devices that meet in
    # several programs at once may wait for each other for ever.
    most = 1 if jax.default_backend() == "cpu" else _MOST_DISPATCHED
    together = int(min(max(_ROUND_SECONDS / (np.median(waited) * at_once), _LEAST_STEPS), most))
    dispatched = rounds(together)
    return {
        "step_seconds": float(np.median(dispatched)),
        "quartiles": [float(q) for q in np.quantile(dispatched, (0.25, 0.75))],
        "waited_seconds": float(np.median(waited)),
        "steps": (len(waited) + len(dispatched) * together) * at_once,
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
        "held_bytes": held_by(executable),
    }


def _shares(call: Callable[[int], Any], executable: Any) -> dict[str, float]:
    """Where the time of a step goes, by the profiler."""
    text = executable.as_text()
    events = step_parts.profile(lambda: [jax.block_until_ready(call(i)) for i in range(_TRACED_STEPS)], text)
    return step_parts.shares(events, step_parts.parts_of(text))


def _against(
    hardware: Hardware, flops: float, traffic: float, predicted: Mapping[str, float], taken: float
) -> dict[str, Any]:
    """Rates beside the hardware's; `roofline` is the time that the busier of arithmetic and memory needs, over ours."""
    bound = max(("compute", "memory"), key=lambda part: predicted[part])
    return {
        "flops": flops,
        "traffic_bytes": traffic,
        "flops_share": flops / taken / hardware.flops,
        "traffic_share": traffic / taken / hardware.memory_rate,
        "bound": bound,
        "roofline": predicted[bound] / taken,
    }


def peak_bytes() -> int:
    """The most that the first device ever held, or, where it does not say (CPUs), this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
