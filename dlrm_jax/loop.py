"""The training run as a story: data, state, resume, steps, evaluations, checkpoints, result."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import jax

from dlrm_jax import checkpoint, heap, huge_pages, processes, reporting
from dlrm_jax.batch import Batch
from dlrm_jax.config import ConfigError, differences
from dlrm_jax.data.load import load_dataset
from dlrm_jax.data.pipeline import Prefetcher, process_shard, steps_per_epoch, train_batches
from dlrm_jax.evaluation import Evaluator, evaluate_splits
from dlrm_jax.monitor import EXCHANGE_OVERFLOWS, Clock, Interrupted, LossWindow, Speed, catch_signals
from dlrm_jax.placement import place_run, prediction
from dlrm_jax.run_config import RunConfig, check_dataset
from dlrm_jax.state import TrainState
from dlrm_jax.stepper import Stepper

_LOG = logging.getLogger("dlrm_jax")


@dataclasses.dataclass
class Progress:
    """How far the evaluations of a run got; saved with each checkpoint, so that stopping rules survive a restart."""

    best_value: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    stopped: str | None = None


class Run:
    """What stays fixed during one call of `train_and_evaluate`."""

    def __init__(self, config: RunConfig, workdir: pathlib.Path) -> None:
        self.config, self.workdir = config, workdir
        raw = load_dataset(config.data)
        self.model = config.model.build(raw)
        self.identity = json.loads(json.dumps(config.identity(self.model, raw)))
        self.dataset, self.ids_out_of_range = check_dataset(raw, self.model, config.ids_out_of_range)
        per_epoch = steps_per_epoch(len(self.dataset.splits["train"]), config.batch_size)
        self.num_steps = config.num_steps or config.num_epochs * per_epoch
        self.eval_every = config.eval_every or per_epoch
        self.checkpoint_every = config.checkpoint_every or per_epoch
        self.placed = place_run(config, self.model, self.dataset)
        self.evaluate = Evaluator(config, self.placed, raw.expander)
        self.writes = processes.is_first()

    def undisturbed(self, step: int) -> int:
        """Steps from `step` to the next one that logs, evaluates or saves, or the last."""
        every = (self.config.log_every, self.eval_every, self.checkpoint_every)
        return min(self.num_steps - step, *(n - step % n for n in every))

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This process's part of the training batches from `start_step` on."""
        config = self.config
        return train_batches(
            self.dataset.splits["train"],
            config.batch_size,
            config.seed,
            start_step,
            shuffle=config.shuffle,
            shard=process_shard(),
            multiple=self.placed.num_devices * config.num_micro_batches,
        )


def train_and_evaluate(
    config: RunConfig, workdir: pathlib.Path, flagfile: str | None = None, defaults: str = ""
) -> dict[str, Any]:
    """Train, or go on training, in `workdir`; returns what `result.json` says. Raises Interrupted after a signal.

    `flagfile` is kept as `flags.txt`, so that the run can be repeated from it; `defaults`, settings that the user left
    open, are told once nothing forbids the run.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    run = Run(config, workdir)
    for split, counts in run.ids_out_of_range.items():
        for feature, count in counts.items():
            _LOG.warning("%s, feature %r: %d ids out of range (%s)", split, feature, count, config.ids_out_of_range)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
        state, progress = restore_or_init(run, checkpoints)
        if defaults:
            _LOG.info("defaults taken: %s", defaults)
        if run.writes:
            reporting.write_json_atomically(workdir / "config.json", dataclasses.asdict(config))
            reporting.write_json_atomically(workdir / "plan.json", run.placed.plan.to_dict())
            if flagfile is not None:
                (workdir / "flags.txt").write_text(flagfile)
        log = stack.enter_context(reporting.MetricsLog(workdir, int(state.step), silent=not run.writes))
        stop_signal = stack.enter_context(catch_signals())
        state, speed, memory = train(run, state, progress, checkpoints, log, stop_signal)
        checkpoints.wait()
        result = final_result(run, state, progress, checkpoints, speed)
        result["step_cost"] = predicted_and_measured(run, speed, memory)
    if run.writes:
        reporting.write_json_atomically(workdir / "result.json", result)
        optimum = run.dataset.optimum
        reporting.plot_curves(workdir, dict(optimum["val"]) if optimum else None)
    return result


def restore_or_init(run: Run, checkpoints: checkpoint.Checkpoints) -> tuple[TrainState, Progress]:
    """The last checkpoint of this workdir, or a fresh state; ConfigError if the workdir belongs to another run."""
    if checkpoints.step(checkpoint.LATEST) is None:
        return run.placed.init_state(run.config.seed), Progress()
    record = checkpoints.record(checkpoint.LATEST)
    different = differences(run.identity, record["identity"])
    if different:
        raise ConfigError(
            f"{run.workdir} holds another run; choose another --workdir or the same settings. "
            f"Differing (this command != the workdir): {'; '.join(different[:8])}"
        )
    state = checkpoints.restore(checkpoint.LATEST, run.placed)
    huge_pages.collapse(state)
    _LOG.info("resumed at step %d of %d", int(state.step), run.num_steps)
    return state, Progress(**record["progress"])


def train(
    run: Run,
    state: TrainState,
    progress: Progress,
    checkpoints: checkpoint.Checkpoints,
    log: reporting.MetricsLog,
    stop_signal: list[int],
) -> tuple[TrainState, Speed, int | None]:
    """Steps until the end, a stopping rule or a signal, with evaluations and checkpoints on their steps."""
    heap.keep_freed_temporaries()
    config, step, speed = run.config, int(state.step), Speed()
    losses = LossWindow(run.workdir, run.dataset.dense_names)
    with (
        Prefetcher(run.batches(step), expander=run.dataset.expander, put=run.placed.put) as batches,
        reporting.Progress(run.num_steps, step, config.batch_size, silent=not run.writes) as bar,
    ):
        clock, alone = Clock(batches, config.batch_size), jax.process_count() == 1
        train_step = Stepper(config, run.placed, batches)
        while step < run.num_steps and progress.stopped is None:
            taken, state = train_step(state, run.undisturbed(step))
            losses.push(step + 1, taken)
            step += len(taken)
            bar.update(step, losses.last)
            at_log, at_eval = step % config.log_every == 0, step % run.eval_every == 0 or step == run.num_steps
            at_checkpoint = step % run.checkpoint_every == 0 or at_eval
            # Several processes stop at one step, so they ask each other where they would wait for each other anyway.
            signum = processes.largest(stop_signal[0] if stop_signal else 0) if alone or at_log or at_checkpoint else 0
            if signum or at_log or at_checkpoint or clock.just_started:
                losses.flush()
                clock.lap(speed, step)
            if at_log:
                rate, wait = float(taken[-1][1]["learning_rate"]), speed.summary()["input_wait_fraction"]
                values = {"loss": losses.mean(), "learning_rate": rate, "input_wait_fraction": wait}
                rounds = {} if losses.overflows is None else {EXCHANGE_OVERFLOWS: losses.overflows}
                log.write(step, "train", values | rounds)
            if at_eval:
                evaluate_progress(run, state, step, progress, checkpoints, log)
            if at_checkpoint or signum or progress.stopped:
                checkpoints.save(checkpoint.LATEST, state, run.placed, record_of(run, progress))
            if signum and progress.stopped is None and step < run.num_steps:
                checkpoints.wait()
                raise Interrupted(signum, step)
            clock.resume()
        memory = train_step.memory_bytes()
        if losses.overflows:
            _LOG.warning("%d steps needed further rounds of the exchange; raise --exchange_capacity", losses.overflows)
    return state, speed, memory


def evaluate_progress(
    run: Run,
    state: TrainState,
    step: int,
    progress: Progress,
    checkpoints: checkpoint.Checkpoints,
    log: reporting.MetricsLog,
) -> None:
    """Evaluate on `val`, keep the best state, and apply the stopping rules to `progress`."""
    config, split = run.config, run.dataset.splits["val"]
    if not len(split):
        return
    values = run.evaluate(state, split)
    log.write(step, "val", values)
    value = values[config.target_metric]
    progress.evals_since_best += 1
    if config.is_better(value, progress.best_value):
        progress.best_value, progress.best_step, progress.evals_since_best = value, step, 0
        checkpoints.save(checkpoint.BEST, state, run.placed, record_of(run, progress))
    reached = f"val {config.target_metric} {value:.6f} at step {step}"
    if config.reaches_target(value):
        progress.stopped = f"{reached} reached the target {config.target_value}"
    elif config.patience and progress.evals_since_best >= config.patience:
        progress.stopped = f"{reached} is the {config.patience}th evaluation without improvement"
    _LOG.info("%s%s", reached, f"; stopping: {progress.stopped}" if progress.stopped else "")


def predicted_and_measured(run: Run, speed: Speed, memory: int | None) -> dict[str, dict[str, float | None]]:
    """Seconds a step and bytes a device: as the planner has them, and as the clock and XLA have them."""
    cost, rate = prediction(run.config, run.placed), speed.summary()["samples_per_second"]
    return {
        "predicted": {"seconds": cost.step_seconds, "bytes": cost.bytes_held},
        "measured": {"seconds": run.config.batch_size / rate if rate else None, "bytes": memory},
    }


def record_of(run: Run, progress: Progress) -> dict[str, Any]:
    """What a checkpoint says besides the state."""
    return {"identity": run.identity, "progress": dataclasses.asdict(progress), "schema": run.dataset.schema}


def final_result(
    run: Run, state: TrainState, progress: Progress, checkpoints: checkpoint.Checkpoints, speed: Speed
) -> dict[str, Any]:
    """Evaluate the best state (the last one where nothing was validated) and put together `result.json`."""
    if progress.best_step is not None and progress.best_step != int(state.step):
        state = checkpoints.restore(checkpoint.BEST, run.placed)
    if progress.stopped:
        _LOG.info("stopped early: %s", progress.stopped)
    result = evaluate_splits(run.config, run.dataset, run.evaluate, state) | speed.summary()
    return result | ({"ids_out_of_range": run.ids_out_of_range} if run.ids_out_of_range else {})
