"""A run's step and forward pass, measured: compile time, step time by parts, work against the hardware, memory."""

import dataclasses
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
from dlrm_jax.training.step import logits
from dlrm_jax.training.stepper import Stepper

TRAIN, FORWARD, INPUT = "train", "forward", "input"
_BATCHES, _WARM_STEPS, _LEAST_STEPS, _TRACED_STEPS = 4, 2, 5, 5


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
    """(the run's model where it lies, its feed, a window on the devices, how long the input takes for a batch)."""
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
    state = placed.init_state(config.seed)
    heap.keep_freed_temporaries()  # As a run does.
    score = jax.jit(
        lambda state, window, step: logits(placed.model, state, feed.batch(window, step), placed.ops),
        in_shardings=(placed.shardings, feed.shardings, None),
    )
    forward, forward_compile = _compiled(score, state, window, np.int32(0))
    steps = 0
    with Prefetcher(itertools.repeat(np.zeros(0)), lambda _: window) as windows:
        stepper = Stepper(config, placed, feed, windows)

        def train(i: int) -> Any:
            nonlocal state, steps
            del i  # The stepper takes the batches in turn.
            taken, state = stepper(state, steps, stepper.at_once)
            steps += taken
            return state.step

        jax.block_until_ready(train(0))
        numbers = _timed(train, stepper.executable, seconds, parts, stepper.at_once)
    return {
        TRAIN: {"compile_seconds": stepper.compile_seconds} | numbers,
        FORWARD: {"compile_seconds": forward_compile}
        | _timed(lambda i: forward(state, window, np.int32(i)), forward, seconds, parts),
    }


def _compiled(jitted: Any, *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    executable = jitted.lower(*args).compile()
    return executable, time.perf_counter() - start


def _timed(
    call: Callable[[int], Any], executable: Any, seconds: float, parts: bool, at_once: int = 1
) -> dict[str, Any]:
    """Median and quartiles of a step's time, `at_once` a call; what it holds by XLA's account; its parts' shares."""
    taken: list[float] = []
    for i in range(_WARM_STEPS):
        jax.block_until_ready(call(i))
    end = time.perf_counter() + seconds
    while len(taken) < _LEAST_STEPS or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(call(len(taken)))
        taken.append((time.perf_counter() - start) / at_once)
    numbers: dict[str, Any] = {
        "step_seconds": float(np.median(taken)),
        "quartiles": [float(q) for q in np.quantile(taken, (0.25, 0.75))],
        "steps": len(taken) * at_once,
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
        "held_bytes": held_by(executable),
    }
    if parts:
        text = executable.as_text()
        events = step_parts.profile(lambda: [jax.block_until_ready(call(i)) for i in range(_TRACED_STEPS)], text)
        numbers["parts"] = step_parts.shares(events, step_parts.parts_of(text))
    return numbers


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
