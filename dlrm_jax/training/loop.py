"""The training run as a story: data, state, resume, steps, evaluations, checkpoints, result."""

import contextlib
import logging
import pathlib
import time
from contextlib import ExitStack
from typing import Any

import jax

from dlrm_jax.config import ConfigError
from dlrm_jax.data.values.label_values import describe_one_class
from dlrm_jax.host import heap, processes
from dlrm_jax.training import checkpoint, plateau, reporting, temperature
from dlrm_jax.training.evaluation import evaluate_splits
from dlrm_jax.training.histograms import Histograms
from dlrm_jax.training.mllog import Length, MlperfLog, Records, facts_of, path_of
from dlrm_jax.training.monitor import Clock, Interrupted, Losses, Speed, catch_signals
from dlrm_jax.training.origin import OpenModel
from dlrm_jax.training.placement import failing_in_one_line, prediction, setting_of
from dlrm_jax.training.profiling import StepsTrace
from dlrm_jax.training.progress import Progress, stopping
from dlrm_jax.training.publishing import OpenPublisher, Publishing, publishing
from dlrm_jax.training.record_options import parse_submission
from dlrm_jax.training.resuming import restore_or_begin
from dlrm_jax.training.run import Run, config_of, record_of, the_only_training
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.stepper import Stepper

_LOG = logging.getLogger("dlrm_jax")
_READ_SECONDS = 1.0
"""How long a loss may stay unread on the device where steps are slow."""


def train_and_evaluate(
    config: RunConfig,
    workdir: pathlib.Path,
    flagfile: str | None = None,
    defaults: str = "",
    open_model: OpenModel | None = None,
    open_publisher: OpenPublisher | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, or go on training, in `workdir`; returns what `result.json` says. Raises Interrupted after a signal.

    `flagfile` is kept as `flags.txt`, so that the run can be repeated from it; `defaults`, settings that the user left
    open, are told once nothing forbids the run. `open_model` opens the exported model of --init_from, `open_publisher`
    what writes the versions of --publish. `progress` shows a bar.
    ConfigError if another training is running there, ResultNotWritten if all is done but the files at the end.
    """
    checkpoint.require_name(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with the_only_training(workdir):
        return _train_and_evaluate(Run(config, workdir, progress), flagfile, defaults, open_model, open_publisher)


class ResultNotWritten(ConfigError):
    """A training whose `result` is known, but could not be written."""

    def __init__(self, result: dict[str, Any], error: OSError) -> None:
        super().__init__(f"the result could not be written: {error.filename}: {error.strerror}; the model is whole")
        self.result = result


def _train_and_evaluate(
    run: Run, flagfile: str | None, defaults: str, open_model: OpenModel | None, open_publisher: OpenPublisher | None
) -> dict[str, Any]:
    config, workdir = run.config, run.workdir
    processes.agree("data", run.identity["data"] | {"plan": run.placed.plan.to_dict()})
    for name, rows in run.dataset.splits.items():
        if rows.only_label is not None:
            _LOG.warning("%s", describe_one_class(name, len(rows), rows.only_label))
    with ExitStack() as stack:
        stack.enter_context(failing_in_one_line(config, run.placed))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
        state, progress = restore_or_begin(run, checkpoints, open_model)
        run.began_at = progress.begun.step
        if defaults:
            _LOG.info("defaults taken: %s", defaults)
        if run.writes:
            reporting.write_json_atomically(workdir / "config.json", config_of(run, progress))
            reporting.write_json_atomically(workdir / "plan.json", run.placed.plan.to_dict())
            if flagfile is not None:
                (workdir / "flags.txt").write_text(flagfile)
        resumed_at = int(state.step)
        metrics = reporting.MetricsLog(workdir, resumed_at, silent=not run.writes)
        mlperf = mlperf_log(run, progress, resumed_at)
        records = Records(stack.enter_context(metrics), stack.enter_context(mlperf))
        stop_signal = stack.enter_context(catch_signals())
        opened = publishing(config, run.placed, run.feed, run.dataset, open_publisher, resumed_at)
        versions = stack.enter_context(opened)
        state, speed, memory = train(run, state, progress, checkpoints, records, stop_signal, versions)
        checkpoints.wait()
        result = final_result(run, state, progress, checkpoints, speed)
        result["step_cost"] = predicted_and_measured(run, speed, memory)
        if resumed_at:
            result = reporting.with_earlier_speed(result, reporting.earlier(workdir, "result.json"))
    if run.writes:
        optimum = run.dataset.optimum
        try:
            reporting.write_json_atomically(workdir / "result.json", result)
            reporting.plot_curves(workdir, dict(optimum["val"]) if optimum else None)
        except OSError as error:
            raise ResultNotWritten(result, error) from error
    return result


def mlperf_log(run: Run, progress: Progress, resumed_at: int) -> MlperfLog:
    """MLPerf's log of this process; it writes nothing where none is asked for, and where no step is left to take."""
    rows = {name: len(split) for name, split in run.dataset.splits.items()}
    length = Length(rows["train"], run.config.batch_size, run.began_at, run.last_step, run.eval_every)
    submission = parse_submission(run.config.records.mllog)
    if submission is None or not run.writes or progress.stopped is not None or resumed_at >= run.last_step:
        return MlperfLog(None, length, {})
    facts = facts_of(run.config, run.model, submission, rows, resumed_at)
    path = path_of(run.workdir, resumed_at if resumed_at > run.began_at else 0)
    return MlperfLog(path, length, facts, run.init_seconds)


def train(
    run: Run,
    state: TrainState,
    progress: Progress,
    checkpoints: checkpoint.Checkpoints,
    records: Records,
    stop_signal: list[int],
    versions: Publishing | None = None,
) -> tuple[TrainState, Speed, int | None]:
    """Steps until the end, a stopping rule or a signal, with evaluations and checkpoints on their steps."""
    heap.keep_freed_temporaries()
    config, step, speed = run.config, int(state.step), Speed()
    alone = jax.process_count() == 1
    records.mlperf.begin(step)
    with (
        run.feed.train_windows(config.seed, step, config.shuffle, run.began_at) as windows,
        reporting.Progress(run.last_step, step, config.batch_size, silent=not run.shows) as bar,
        StepsTrace(config.profile_steps, run.workdir, run.writes) as trace,
        shown_of(run, records.metrics) as shown,
    ):
        train_step = Stepper(config, run.placed, run.feed, windows, shown)
        clock = Clock(train_step, config.batch_size)

        def write(logged_step: int, values: dict[str, Any]) -> None:
            records.metrics.write(logged_step, "train", values | clock.waits(speed))

        names = run.dataset.dense_names
        losses = Losses(run.workdir, names, progress.losses, config.log_every, write, run.feed.host_batch)
        while step < run.last_step and progress.stopped is None:
            trace.before(step, state)
            records.mlperf.before(step)
            to_version = versions and versions.undisturbed(step)
            taken, state = train_step(state, step, min(run.undisturbed(step), to_version or run.num_steps))
            step += taken
            trace.after(step, state, train_step)
            records.mlperf.after(step, state)
            own = step - run.began_at
            at_eval = own % run.eval_every == 0 or own == run.num_steps
            at_checkpoint = own % run.checkpoint_every == 0 or at_eval
            # Several processes stop at one step: they ask each other where all have come to the end of a window.
            asked = alone or train_step.at_window_end or at_checkpoint
            signum = processes.largest(stop_signal[0] if stop_signal else 0) if asked else 0
            at_version = versions is not None and versions.due(step, asked)
            if versions is not None and (at_version or at_eval or train_step.at_window_end):
                versions.see(train_step.record, step)
            if signum or at_checkpoint or at_version or clock.just_started:
                losses.flush(train_step.record, step)
                train_step.pause()
                clock.lap(speed, step)
            elif train_step.at_window_end:
                losses.push(train_step.record, step)
            elif time.perf_counter() - losses.last_read > _READ_SECONDS:
                losses.flush(train_step.record, step)
                train_step.caught_up()
            bar.update(step, losses.last, clock.rate(speed, step), clock.waits(speed))
            progress.losses = losses.held()
            if versions is not None and at_version:
                versions.publish(state, step)
            if at_eval:
                state = evaluate_progress(run, state, step, progress, checkpoints, records)
            if at_checkpoint or signum or progress.stopped:
                checkpoints.save(checkpoint.LATEST, state, run.placed, record_of(run, progress))
            if signum and progress.stopped is None and step < run.last_step:
                checkpoints.wait()
                raise Interrupted(signum, step)
            clock.resume()
        best = progress.best_value
        target_met = config.target_value is None or (best is not None and config.reaches_target(best))
        records.mlperf.stop(step, success=target_met)
        if versions is not None:
            versions.finish(state, step)
        memory = train_step.memory_bytes()
        if losses.overflows:
            _LOG.warning("%d steps needed further rounds of the exchange; raise --exchange_capacity", losses.overflows)
    return state, speed, memory


def shown_of(run: Run, log: reporting.MetricsLog) -> contextlib.AbstractContextManager[Histograms | None]:
    """The histograms of a run, None where none are asked for."""
    wanted = run.config.records.histogram_rows > 0
    return Histograms(run.config, run.placed, log) if wanted else contextlib.nullcontext()


def evaluate_progress(
    run: Run,
    state: TrainState,
    step: int,
    progress: Progress,
    checkpoints: checkpoint.Checkpoints,
    records: Records,
) -> TrainState:
    """Evaluate on `val`, keep the best state, apply the stopping rules to `progress`; the state to go on with."""
    config, split = run.config, run.dataset.splits["val"]
    if not len(split):
        return state
    records.mlperf.evaluates(step)
    scores = run.evaluate.score(state, split)
    values = scores.compute()
    records.mlperf.evaluated(step, values["auc"])
    records.metrics.write(step, "val", values)
    value = values[config.target_metric]
    progress.target_metric = config.target_metric
    progress.evals_since_best += 1
    if config.is_better(value, progress.best_value):
        progress.best_value, progress.best_step, progress.evals_since_best = value, step, 0
        best = state
        if config.fit_temperature:
            factor = temperature.fitted_factor(scores.scored())
            best = temperature.with_logits_times(factor, state, run.model)
        checkpoints.save(checkpoint.BEST, best, run.placed, record_of(run, progress))
    progress.stopped = stopping(config, progress)
    reached = f"val {config.target_metric} {value:.6f} at step {step}"
    _LOG.info("%s%s", reached, f"; stopping: {progress.stopped}" if progress.stopped else "")
    return plateau.cut_where_stalled(config.optimizer.schedule, progress.stall, value, config.smaller_is_better, state)


def predicted_and_measured(run: Run, speed: Speed, memory: int | None) -> dict[str, dict[str, Any]]:
    """Seconds a step and bytes a device: as the planner has them, also by part, and as the clock and XLA have them."""
    cost, rate = prediction(run.config, run.placed), speed.summary()["samples_per_second"]
    hardware = setting_of(run.config, run.model, run.placed.plan.mesh).hardware.name
    return {
        "predicted": {
            "seconds": cost.step_seconds,
            "bytes": cost.bytes_held + run.feed.device_bytes,
            "hardware": hardware,
            "parts": dict(cost.seconds),
        },
        "measured": {"seconds": run.config.batch_size / rate if rate else None, "bytes": memory},
    }


def final_result(
    run: Run, state: TrainState, progress: Progress, checkpoints: checkpoint.Checkpoints, speed: Speed
) -> dict[str, Any]:
    """Evaluate the best state (the last one where nothing was validated) and put together `result.json`."""
    last_step = int(state.step)
    if progress.best_step is not None and (progress.best_step != last_step or run.config.fit_temperature):
        jax.tree.map(lambda array: array.delete(), state)  # Both together may not fit; the last state is saved.
        try:
            state = checkpoints.restore(checkpoint.BEST, run.placed)
        except ConfigError as error:
            _LOG.warning("%s; the result is that of the last step, %d", error, last_step)
            state = checkpoints.restore(checkpoint.LATEST, run.placed)
    if progress.stopped:
        _LOG.info("stopped early: %s", progress.stopped)
    return evaluate_splits(run.config, run.dataset, run.evaluate, state) | speed.summary()
