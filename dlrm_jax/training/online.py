"""Progressive validation: each period of a log is scored by the model as it is then, and trained on after that.

Beside the living model there may be one that was frozen after the first periods, and one that is trained anew, from
fresh weights on all periods so far, before each period. A checkpoint holds the model behind its last whole period and
all scores so far, so that a run that was stopped goes on there, to the same bits.
"""

import dataclasses
import itertools
import logging
import pathlib
from contextlib import ExitStack
from typing import Any

from dlrm_jax.config import ConfigError, differences, from_dict, require, tell
from dlrm_jax.data.read.load import named
from dlrm_jax.data.read.windows import concatenate
from dlrm_jax.host import heap, processes
from dlrm_jax.training import checkpoint, reporting
from dlrm_jax.training.beginning import begin
from dlrm_jax.training.evicting import Eviction
from dlrm_jax.training.monitor import Interrupted, Losses, catch_signals
from dlrm_jax.training.origin import OpenModel
from dlrm_jax.training.periods import Online, OnlineOptions
from dlrm_jax.training.placement import failing_in_one_line
from dlrm_jax.training.progress import Progress
from dlrm_jax.training.publishing import OpenPublisher, Publishing, publishing
from dlrm_jax.training.run import the_only_training
from dlrm_jax.training.run_config import RunConfig, identity_of
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.stepper import Stepper

_LOG = logging.getLogger("dlrm_jax")
RESULTS = "online.json"
LIVING, FROZEN, RETRAINED, OPTIMUM = MODELS = ("living", "frozen", "retrained", "optimum")
"""Whose scores of a period there may be."""
EVICTED = "evicted"
"""Key of how many rows of each table were evicted behind a period."""


def validate_progressively(
    config: RunConfig,
    options: OnlineOptions,
    workdir: pathlib.Path,
    flagfile: str | None = None,
    open_model: OpenModel | None = None,
    open_publisher: OpenPublisher | None = None,
) -> dict[str, Any]:
    """Score and train on period after period, or go on with it, in `workdir`; what `online.json` says.

    `open_model` opens the exported model of --init_from, `open_publisher` what writes the versions of --publish.
    """
    checkpoint.require_name(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with the_only_training(workdir):
        run = Online(config, options, workdir)
        processes.agree("data", run.opened.identity["data"] | {"plan": run.placed.plan.to_dict()})
        with failing_in_one_line(config, run.placed), ExitStack() as stack:
            checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
            state, progress = _restore_or_begin(run, checkpoints, open_model)
            log = stack.enter_context(reporting.MetricsLog(workdir, int(state.step), silent=not processes.is_first()))
            stop = stack.enter_context(catch_signals())
            if processes.is_first():
                _write_settings(run, progress, flagfile)
            heap.keep_freed_temporaries()
            opened = publishing(config, run.placed, run.feed, run.dataset, open_publisher, int(state.step))
            with opened as versions:
                state = _live(run, state, progress, checkpoints, log, stop, versions)
                if versions is not None:
                    versions.finish(state, int(state.step))
            checkpoints.wait()
            if options.retrain:
                del state
                _retrain(run, progress, stop)
        return _write_results(run, progress)


def _restore_or_begin(
    run: Online, checkpoints: checkpoint.Checkpoints, open_model: OpenModel | None
) -> tuple[TrainState, Progress]:
    """The state behind the last whole period, or a first one; ConfigError if the workdir belongs to another run."""
    if checkpoints.step(checkpoint.LATEST) is None:
        state, begun = begin(run.config, run.workdir, run.placed, run.dataset, open_model)
        return state, Progress(begun=begun, online={"settings": run.settings, "done": 0, "scores": {}})
    record = checkpoints.record(checkpoint.LATEST)
    progress: Progress = from_dict(Progress, record["progress"], "the checkpoint's progress")
    require(bool(progress.online), f"{run.workdir} holds a run of dlrm_jax.train; choose another --workdir")
    now = run.opened.identity | {"online": run.settings}
    different = differences(now, identity_of(record) | {"online": progress.online["settings"]})
    if different:
        raise ConfigError(
            f"{run.workdir} holds another run; choose another --workdir (--init_from={run.workdir} takes its model) or "
            f"the same settings. Differing (this command != the workdir): {tell(different)}"
        )
    progress.begun.require_same(run.config, run.workdir)
    state = checkpoints.restore(checkpoint.LATEST, run.placed)
    _LOG.info("%d of %d periods are done, at step %d", progress.online["done"], len(run.periods), int(state.step))
    return state, progress


def _write_settings(run: Online, progress: Progress, flagfile: str | None) -> None:
    """What `evaluate` and `export` need to find the model."""
    config = dataclasses.replace(progress.begun.noted_in(run.config), data=named(run.config.data, run.dataset))
    reporting.write_json_atomically(run.workdir / "config.json", dataclasses.asdict(config))
    reporting.write_json_atomically(run.workdir / "plan.json", run.placed.plan.to_dict())
    if flagfile is not None:
        (run.workdir / "flags.txt").write_text(flagfile)


def _live(
    run: Online,
    state: TrainState,
    progress: Progress,
    checkpoints: checkpoint.Checkpoints,
    log: reporting.MetricsLog,
    stop: list[int],
    versions: Publishing | None,
) -> TrainState:
    """Score each period that is left, train on it, and publish what comes of it; the last state."""
    done, scores, step = progress.online["done"], progress.online["scores"], int(state.step)
    if done == len(run.periods):
        return state
    with run.feed.windows(run.passes(done), step) as windows:
        train_step = run.stepper(windows)
        losses = Losses(
            run.workdir,
            run.dataset.dense_names,
            progress.losses,
            run.config.log_every,
            lambda logged_step, values: log.write(logged_step, "train", values),
            run.feed.host_batch,
        )
        for number in range(done, len(run.periods)):
            _score(run, scores, LIVING, state, number)
            state = _train(run, train_step, losses, state, step, run.steps(run.rows[number]), stop, versions)
            step += run.steps(run.rows[number])
            if run.decay is not None:
                state = run.decay(state)
            if run.evict is not None:
                state = _evict(run, run.evict, state, number, scores, versions)
            if versions is not None:  # Before the checkpoint: who goes on behind it finds this version there.
                versions.publish(state, step)
            progress.losses = losses.held()
            if number + 1 == run.options.frozen_after:
                for later in range(number + 1, len(run.periods)):
                    _score(run, scores, FROZEN, state, later)
            progress.online["done"] = number + 1
            record = {"identity": run.opened.identity, "progress": dataclasses.asdict(progress)}
            checkpoints.save(checkpoint.LATEST, state, run.placed, record | {"schema": run.dataset.schema})
            _write_results(run, progress)
    return state


def _evict(
    run: Online,
    evict: Eviction,
    state: TrainState,
    number: int,
    scores: dict[str, Any],
    versions: Publishing | None,
) -> TrainState:
    """The state behind a period without rows that nobody asks for any more, which are counted, and marked."""
    state, evicted = evict(state, number)
    scores[run.periods[number].name][EVICTED] = evicted
    _LOG.info("%s: %s rows evicted", run.periods[number].name, f"{sum(evicted.values()):,}")
    if versions is not None:
        versions.mark(evict.rows(number))
    return state


def _train(
    run: Online,
    train_step: Stepper,
    losses: Losses,
    state: TrainState,
    step: int,
    count: int,
    stop: list[int],
    versions: Publishing | None = None,
) -> TrainState:
    """`count` steps from `step` on. Interrupted after a signal: what is saved is the period before."""
    end = step + count
    while step < end:
        to_version = (versions and versions.undisturbed(step)) or count
        taken, state = train_step(state, step, min(end - step, to_version))
        step += taken
        asked = processes.count() == 1 or train_step.at_window_end or step == end
        if asked and (signum := processes.largest(stop[0] if stop else 0)):
            raise Interrupted(signum, step)
        at_version = versions is not None and step < end and versions.due(step, asked)
        if versions is not None and (at_version or train_step.at_window_end or step == end):
            versions.see(train_step.record, step)
        if versions is not None and at_version:
            losses.flush(train_step.record, step)
            train_step.pause()
            versions.publish(state, step)
        elif step < end and train_step.at_window_end:
            losses.push(train_step.record, step)
    losses.flush(train_step.record, step)
    train_step.pause()
    return state


def _score(run: Online, scores: dict[str, Any], model: str, state: TrainState, number: int) -> None:
    name = run.periods[number].name
    found = run.scores(state, number)
    scores.setdefault(name, {})[model] = found
    auc = "-" if found["auc"] is None else f"{found['auc']:.5f}"
    _LOG.info("%s, %s: AUC %s, log loss %.5f", name, model, auc, found["log_loss"])


def _retrain(run: Online, progress: Progress, stop: list[int]) -> None:
    """The scores of a model that is trained anew before each period, on all rows before it."""
    scores, passes = progress.online["scores"], run.options.retrain
    earlier = reporting.earlier(run.workdir, RESULTS)
    if earlier.get("retrain") == passes:
        for period in earlier.get("periods", ()):
            if RETRAINED in period:
                scores[period["name"]][RETRAINED] = period[RETRAINED]
    for number in range(1, len(run.periods)):
        if RETRAINED in scores[run.periods[number].name]:
            continue
        rows = concatenate([one.whole() for one in run.rows[:number]])
        epochs = (rows.windows(run.config.seed, epoch, True) for epoch in itertools.count())
        with run.feed.windows(epochs, 0) as windows:
            train_step = run.stepper(windows)
            names = run.dataset.dense_names
            losses = Losses(run.workdir, names, {}, run.config.log_every, lambda *_: None, run.feed.host_batch)
            state = run.placed.init_state(run.config.seed)
            state = _train(run, train_step, losses, state, 0, passes * run.steps(rows), stop)
        _score(run, scores, RETRAINED, state, number)
        _write_results(run, progress)


def _write_results(run: Online, progress: Progress) -> dict[str, Any]:
    """`online.json`: a list of periods, each with the scores of the models that there are."""
    scores, optimum = progress.online["scores"], run.dataset.optimum or {}
    periods = []
    for period in run.periods[: progress.online["done"]]:
        known = {name: found for name in MODELS if (found := scores[period.name].get(name))}
        if EVICTED in scores[period.name]:
            known[EVICTED] = scores[period.name][EVICTED]
        if period.name in optimum:
            known[OPTIMUM] = dict(optimum[period.name])
        facts = {"name": period.name, "start": period.start, "rows": period.rows, "positives": period.positives}
        periods.append(facts | known)
    result = {"frozen_after": run.options.frozen_after, "retrain": run.options.retrain, "periods": periods}
    result |= {"decay_sums": run.options.decay_sums, "seed": run.config.seed, "versions": reporting.versions()}
    if processes.is_first():
        reporting.write_json_atomically(run.workdir / RESULTS, result)
    return result
