"""The training run as a story: data, state, resume, steps, evaluations, checkpoints, result."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import jax

from dlrm_jax.config import ConfigError, differences, from_dict, tell
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.load import named
from dlrm_jax.data.read.pipeline import Prefetcher, process_shard, steps_per_epoch, train_batches
from dlrm_jax.data.values.label_values import describe_one_class
from dlrm_jax.host import files, heap, huge_pages, processes
from dlrm_jax.training import checkpoint, plateau, reporting, temperature
from dlrm_jax.training.evaluation import Evaluator, evaluate_splits
from dlrm_jax.training.monitor import EXCHANGE_OVERFLOWS, Clock, Interrupted, LossWindow, Speed, catch_signals
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.placement import failing_in_one_line, prediction, setting_of
from dlrm_jax.training.run_config import EARLIER_SCHEDULES, RunConfig, identity_of
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.stepper import Stepper

_LOG = logging.getLogger("dlrm_jax")


@dataclasses.dataclass
class Progress:
    """How far the evaluations of a run got; saved with each checkpoint, so that stopping rules survive a restart."""

    best_value: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    stopped: str | None = None
    target_metric: str | None = None
    """What `best_value` is of; None in checkpoints of before it was noted, where config.json says it."""
    losses: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Losses since the last line of the log (monitor.LossWindow)."""
    stall: plateau.Stall = dataclasses.field(default_factory=plateau.Stall)
    """Evaluations without a gain, after which the rate is cut."""
    earlier_schedules: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Where the run went on with another learning rate: the settings it had before, and `until_step`."""


class Run:
    """What stays fixed during one call of `train_and_evaluate`."""

    def __init__(self, config: RunConfig, workdir: pathlib.Path) -> None:
        self.config, self.workdir = config, workdir
        _LOG.info("loading %s", config.data.data_dir or config.data.dataset)
        opened = open_run(config, workdir)
        self.model, self.dataset, self.identity = opened.model, opened.dataset, opened.identity
        num_rows = len(self.dataset.splits["train"])
        per_epoch = steps_per_epoch(num_rows, config.batch_size)
        self.num_steps = config.num_steps or config.num_epochs * per_epoch
        if num_rows < config.batch_size:
            _LOG.warning("%d training rows, the rest of --batch_size=%d is padding", num_rows, config.batch_size)
        if config.eval_every > self.num_steps:
            _LOG.warning(
                "--eval_every=%d is beyond the last step, %d: val is scored once, at the end",
                config.eval_every,
                self.num_steps,
            )
        self._require_val_rows()
        self.eval_every = config.eval_every or per_epoch
        self.checkpoint_every = config.checkpoint_every or per_epoch
        self.placed = opened.place(checkpoint.COPIES)
        self.evaluate = Evaluator(config, self.placed, self.dataset.expander)
        self.writes = processes.is_first()

    def _require_val_rows(self) -> None:
        if len(self.dataset.splits["val"]):
            return
        if self.config.target_value is not None:
            raise ConfigError(
                f"--target_value={self.config.target_value} needs val rows, and {self.dataset.name} has none"
            )
        if self.config.optimizer.schedule.plateau:
            raise ConfigError(f"--lr_plateau needs val rows, and {self.dataset.name} has none; leave it out")
        if self.config.patience:  # Not refused, as it is there by default.
            _LOG.warning(
                "%s has no val rows: all %d steps are taken, whatever --patience", self.dataset.name, self.num_steps
            )

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
    open, are told once nothing forbids the run. ConfigError if another training is running there, ResultNotWritten if
    all is done but the files at the end.
    """
    checkpoint.require_name(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with the_only_training(workdir):
        return _train_and_evaluate(config, workdir, flagfile, defaults)


@contextlib.contextmanager
def the_only_training(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the workdir's lock, the first of several processes for all; ConfigError in all if it is taken."""
    refusal: Exception = ConfigError(f"another training is running in {workdir}")
    taken = False
    with ExitStack() as stack:
        if processes.is_first():
            try:
                stack.enter_context(files.alone(workdir / files.LOCK, str(refusal)))
            except (ConfigError, OSError) as error:
                refusal, taken = error, True
        if processes.largest(int(taken)):
            raise refusal
        yield


class ResultNotWritten(ConfigError):
    """A training whose `result` is known, but could not be written."""

    def __init__(self, result: dict[str, Any], error: OSError) -> None:
        super().__init__(f"the result could not be written: {error.filename}: {error.strerror}; the model is whole")
        self.result = result


def _train_and_evaluate(
    config: RunConfig, workdir: pathlib.Path, flagfile: str | None, defaults: str
) -> dict[str, Any]:
    run = Run(config, workdir)
    processes.agree("data", run.identity["data"] | {"plan": run.placed.plan.to_dict()})
    for name, rows in run.dataset.splits.items():
        if rows.only_label is not None:
            _LOG.warning("%s", describe_one_class(name, len(rows), rows.only_label))
    with ExitStack() as stack:
        stack.enter_context(failing_in_one_line(config, run.placed))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
        state, progress = restore_or_init(run, checkpoints)
        if defaults:
            _LOG.info("defaults taken: %s", defaults)
        if run.writes:
            reporting.write_json_atomically(workdir / "config.json", config_of(run, progress))
            reporting.write_json_atomically(workdir / "plan.json", run.placed.plan.to_dict())
            if flagfile is not None:
                (workdir / "flags.txt").write_text(flagfile)
        resumed_at = int(state.step)
        log = stack.enter_context(reporting.MetricsLog(workdir, resumed_at, silent=not run.writes))
        stop_signal = stack.enter_context(catch_signals())
        state, speed, memory = train(run, state, progress, checkpoints, log, stop_signal)
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


def restore_or_init(run: Run, checkpoints: checkpoint.Checkpoints) -> tuple[TrainState, Progress]:
    """The last checkpoint of this workdir, or a fresh state; ConfigError if the workdir belongs to another run."""
    if checkpoints.step(checkpoint.LATEST) is None:
        return run.placed.init_state(run.config.seed), Progress()
    record = checkpoints.record(checkpoint.LATEST)
    progress: Progress = from_dict(Progress, record["progress"], "the checkpoint's progress")
    require_the_same_run(run, record, checkpoints.step(checkpoint.LATEST) or 0, progress)
    state = checkpoints.restore(checkpoint.LATEST, run.placed)
    huge_pages.collapse(state)
    if progress.best_step not in (None, there := checkpoints.step(checkpoint.BEST)):
        # Where a run went back to an earlier step, the one that is there comes from beyond it.
        instead = "" if there is None else f" (one of step {there} is there)"
        _LOG.warning(
            "the best checkpoint, of step %d, is missing%s: the best from here on is kept", progress.best_step, instead
        )
        progress.best_value = progress.best_step = None
    progress.stopped = stopping(run.config, progress)
    _LOG.info("resumed at step %d of %d", int(state.step), run.num_steps)
    return state, progress


def require_the_same_run(run: Run, record: dict[str, Any], step: int, progress: Progress) -> None:
    """ConfigError unless `run` may go on from a checkpoint's record; a change of schedule is noted in `progress`."""
    config, then = run.config, identity_of(record)
    changed = differences(run.identity["optimizer"]["schedule"], then["optimizer"]["schedule"])
    different = differences(run.identity, then)
    if len(different) > (len(changed) if config.allow_schedule_change else 0):
        only = len(different) == len(changed)
        raise ConfigError(
            f"{run.workdir} holds another run; choose another --workdir or the same settings"
            f"{', or go on with --allow_schedule_change' if only else ''}. "
            f"Differing (this command != the workdir): {tell(different)}"
        )
    plateaus = run.identity["optimizer"]["schedule"]["plateau"], then["optimizer"]["schedule"]["plateau"]
    if bool(plateaus[0]) != bool(plateaus[1]):
        raise ConfigError(
            f"{run.workdir} was trained with{'' if plateaus[1] else 'out'} --lr_plateau, and goes on so; leave it "
            f"{'in' if plateaus[1] else 'out'}, or choose another --workdir"
        )
    if step > run.num_steps:
        raise ConfigError(
            f"{run.workdir} is at step {step} already, beyond the {run.num_steps} asked for; nothing was changed. "
            "Ask for more --num_steps or --num_epochs, or choose another --workdir"
        )
    metric = progress.target_metric or reporting.earlier(run.workdir, "config.json").get("target_metric")
    if progress.best_value is not None and metric not in (None, config.target_metric):
        raise ConfigError(
            f"{run.workdir} chose its best checkpoint by {metric}, not by --target_metric={config.target_metric}; "
            "choose another --workdir or the same metric"
        )
    if changed:
        progress.earlier_schedules.append({"until_step": step, **then["optimizer"]["schedule"]})
        _LOG.info("from step %d on with another schedule (now != before): %s", step, tell(changed))


def config_of(run: Run, progress: Progress) -> dict[str, Any]:
    """What `config.json` says: the settings, the data by its own name, and what the schedule was before, if another."""
    config = dataclasses.replace(run.config, data=named(run.config.data, run.dataset))
    earlier = {EARLIER_SCHEDULES: progress.earlier_schedules} if progress.earlier_schedules else {}
    return dataclasses.asdict(config) | earlier


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
    losses = LossWindow(run.workdir, run.dataset.dense_names, progress.losses)
    with (
        Prefetcher(run.batches(step), expander=run.dataset.expander, put=run.placed.put) as batches,
        reporting.Progress(run.num_steps, step, config.batch_size, silent=not run.writes) as bar,
    ):
        alone = jax.process_count() == 1
        train_step = Stepper(config, run.placed, batches)
        clock = Clock(batches, config.batch_size, lambda: train_step.compile_seconds)
        while step < run.num_steps and progress.stopped is None:
            taken, state = train_step(state, run.undisturbed(step))
            losses.push(step + 1, taken)
            step += len(taken)
            at_log, at_eval = step % config.log_every == 0, step % run.eval_every == 0 or step == run.num_steps
            at_checkpoint = step % run.checkpoint_every == 0 or at_eval
            # Several processes stop at one step, so they ask each other where they would wait for each other anyway.
            signum = processes.largest(stop_signal[0] if stop_signal else 0) if alone or at_log or at_checkpoint else 0
            if signum or at_log or at_checkpoint or clock.just_started:
                losses.flush()
                clock.lap(speed, step)
            bar.update(step, losses.last, clock.rate(speed, step))
            if at_log:
                rate, wait = float(taken[-1][1]["learning_rate"]), speed.summary()["input_wait_fraction"]
                values = {"loss": losses.mean(), "learning_rate": rate, "input_wait_fraction": wait}
                rounds = {} if losses.overflows is None else {EXCHANGE_OVERFLOWS: losses.overflows}
                log.write(step, "train", values | rounds)
            progress.losses = losses.held()
            if at_eval:
                state = evaluate_progress(run, state, step, progress, checkpoints, log)
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
) -> TrainState:
    """Evaluate on `val`, keep the best state, apply the stopping rules to `progress`; the state to go on with."""
    config, split = run.config, run.dataset.splits["val"]
    if not len(split):
        return state
    scores = run.evaluate.score(state, split)
    values = scores.compute()
    log.write(step, "val", values)
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


def stopping(config: RunConfig, progress: Progress) -> str | None:
    """Why a run ends here under today's stopping rules; None if it goes on."""
    best = f"no val {config.target_metric} so far"
    if progress.best_value is not None:
        best = f"val {config.target_metric} {progress.best_value:.6f} at step {progress.best_step}"
        if config.reaches_target(progress.best_value):
            return f"{best} reached the target {config.target_value}"
    if config.patience and progress.evals_since_best >= config.patience:
        return (
            f"{best}, and {progress.evals_since_best} of --patience={config.patience} evaluations without a better one"
        )
    return None


def predicted_and_measured(run: Run, speed: Speed, memory: int | None) -> dict[str, dict[str, Any]]:
    """Seconds a step and bytes a device: as the planner has them, and as the clock and XLA have them."""
    cost, rate = prediction(run.config, run.placed), speed.summary()["samples_per_second"]
    hardware = setting_of(run.config, run.model, run.placed.plan.mesh).hardware.name
    return {
        "predicted": {"seconds": cost.step_seconds, "bytes": cost.bytes_held, "hardware": hardware},
        "measured": {"seconds": run.config.batch_size / rate if rate else None, "bytes": memory},
    }


def record_of(run: Run, progress: Progress) -> dict[str, Any]:
    """What a checkpoint says besides the state."""
    return {"identity": run.identity, "progress": dataclasses.asdict(progress), "schema": run.dataset.schema}


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
