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

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.pipeline import Prefetcher, train_batches
from dlrm_jax.host import heap
from dlrm_jax.host.memory import held_by
from dlrm_jax.planning.cost import estimate, forward_work
from dlrm_jax.planning.hardware import Hardware
from dlrm_jax.training import step_parts
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.placement import failing_in_one_line, setting_of
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.step import logits, make_train_step
from dlrm_jax.training.stepper import Stepper

TRAIN, FORWARD, INPUT = "train", "forward", "input"
_BATCHES, _WARM_STEPS, _LEAST_STEPS, _MOST_DISPATCHED, _TRACED_STEPS = 4, 2, 5, 200, 5
_ROUND_SECONDS = 0.1
_TRACED_OPTIONS: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_enable_command_buffer": ""}}
"""Of the compiler, for the profiler: it would see a GPU's step as one operation, the command buffer it is put in."""


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
    placed, batches, input_numbers = _placed_batches(config, seconds, workdir)
    setting = setting_of(config, placed.model, placed.plan.mesh)
    hardware = hardware or setting.hardware
    cost = estimate(placed.model, config.optimizer, placed.plan, setting.load, hardware, placed.options)
    work = {
        TRAIN: (cost.flops, cost.traffic, cost.seconds),
        FORWARD: forward_work(placed.model, placed.stacks, setting.load, hardware),
    }
    with failing_in_one_line(config, placed):
        numbers = {INPUT: input_numbers} | _passes(config, placed, batches, seconds, parts)
    for kind, (flops, traffic, predicted) in work.items():
        numbers[kind] |= _against(hardware, flops, traffic, predicted, numbers[kind]["step_seconds"])
        numbers[kind]["samples_per_second"] = config.batch_size / numbers[kind]["step_seconds"]
    return numbers | {
        "batch_size": config.batch_size,
        "devices": placed.num_devices,
        "hardware": dataclasses.asdict(hardware),
        "peak_bytes": peak_bytes(),
    }


def _placed_batches(
    config: RunConfig, seconds: float, workdir: pathlib.Path | None
) -> tuple[Placed, list[Batch], dict[str, float]]:
    """The run's model where it lies, some of its batches on the devices, and how long the input takes for one."""
    opened = open_run(config, workdir)
    placed, dataset = opened.place(), opened.dataset
    multiple = placed.num_devices * config.num_micro_batches
    rows = dataset.splits["train"]
    source = train_batches(rows, config.batch_size, config.seed, 0, shuffle=config.shuffle, multiple=multiple)
    with Prefetcher(source, depth=1, expander=dataset.expander, put=placed.put) as prefetcher:
        batches = [batch for _, batch in itertools.islice(prefetcher, _BATCHES)]
        start = time.perf_counter()
        end, count = start + min(seconds, 2.0), 0
        while count < _LEAST_STEPS or time.perf_counter() < end:
            jax.block_until_ready(next(prefetcher)[1])
            count += 1
        return placed, batches, {"step_seconds": (time.perf_counter() - start) / count}


def _passes(
    config: RunConfig, placed: Placed, batches: list[Batch], seconds: float, parts: bool
) -> dict[str, dict[str, Any]]:
    """The measured numbers of both passes."""
    held = [placed.init_state(config.seed)]
    heap.keep_freed_temporaries()  # As a run does.
    stepper = Stepper(config, placed, itertools.cycle((batch, batch) for batch in batches))
    settings = (placed.model, config.loss, config.optimizer, config.num_micro_batches, placed.ops, config.seed)
    score = jax.jit(
        lambda state, batch: logits(placed.model, state, batch, placed.ops),
        in_shardings=(placed.shardings, placed.batch_sharding),
    )
    start = time.perf_counter()
    forward = score.lower(held[0], batches[0]).compile()
    forward_compile, at_once = time.perf_counter() - start, config.steps_per_dispatch

    def train(i: int) -> Any:
        del i  # The stepper takes the batches in turn.
        taken, held[0] = stepper(held[0], at_once)
        return taken[-1][1]

    def stepping(executable: Any, i: int) -> Any:
        held[0], step_metrics = executable(held[0], batches[i % _BATCHES])
        return step_metrics

    def scoring(executable: Any, i: int) -> Any:
        return executable(held[0], batches[i % _BATCHES])

    jax.block_until_ready(train(0))
    scored = functools.partial(scoring, forward)
    numbers: dict[str, dict[str, Any]] = {
        TRAIN: {"compile_seconds": stepper.compile_seconds} | _timed(train, stepper.executable, seconds, at_once),
        FORWARD: {"compile_seconds": forward_compile} | _timed(scored, forward, seconds),
    }
    if parts:
        traced: list[tuple[Callable[[int], Any], Any]] = [(train, stepper.executable), (scored, forward)]
        if options := _TRACED_OPTIONS.get(jax.default_backend()):
            jitted = ((placed.jit_step(make_train_step(*settings)), stepping), (score, scoring))
            compiled = [one.lower(held[0], batches[0]).compile(compiler_options=options) for one, _ in jitted]
            traced = [(functools.partial(call, one), one) for (_, call), one in zip(jitted, compiled, strict=True)]
        for kind, one in zip((TRAIN, FORWARD), traced, strict=True):
            numbers[kind]["parts"] = _shares(*one)
    return numbers


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
