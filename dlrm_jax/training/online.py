"""Progressive validation: each period of a log is scored by the model as it is then, and trained on after that.

Beside the living model there may be one that was frozen after the first periods, and one that is trained anew, from
fresh weights on all periods so far, before each period. A checkpoint holds the model behind its last whole period and
all scores so far, so that a run that was stopped goes on there, to the same bits.
"""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from dlrm_jax.config import ConfigError, differences, from_dict, require, tell
from dlrm_jax.data.read.dataset import Rows
from dlrm_jax.data.read.load import named
from dlrm_jax.data.read.periods import between, periods_of, rows_of_period
from dlrm_jax.data.read.pipeline import Cut, process_shard, steps_per_epoch
from dlrm_jax.data.read.windows import concatenate
from dlrm_jax.host import heap, processes
from dlrm_jax.training import checkpoint, reporting
from dlrm_jax.training.beginning import begin
from dlrm_jax.training.evaluation import Evaluator
from dlrm_jax.training.evicting import Eviction
from dlrm_jax.training.feed import make_feed
from dlrm_jax.training.forgetting import make_decay
from dlrm_jax.training.loop import the_only_training
from dlrm_jax.training.monitor import Interrupted, Losses, catch_signals
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.origin import OpenModel
from dlrm_jax.training.placement import failing_in_one_line
from dlrm_jax.training.progress import Progress
from dlrm_jax.training.run_config import RunConfig, identity_of
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.stepper import Stepper

_LOG = logging.getLogger("dlrm_jax")
RESULTS = "online.json"
LIVING, FROZEN, RETRAINED, OPTIMUM = MODELS = ("living", "frozen", "retrained", "optimum")
"""Whose scores of a period there may be."""
EVICTED = "evicted"
"""Key of how many rows of each table were evicted behind a period."""


@dataclasses.dataclass(frozen=True)
class OnlineOptions:
    """`periods` are FIRST:LAST by name, all where empty. A model is frozen after so many (0: none); one is trained anew
    before each period, in so many passes over all before it (0: none).
    """

    periods: str = ""
    frozen_after: int = 1
    retrain: int = 0
    decay_sums: float = 1.0
    """What Adagrad's sums are multiplied with behind each period."""
    evict_after: int = 0
    """Periods after which a row that none of them asked for becomes the out-of-vocabulary row; 0: never."""

    def __post_init__(self) -> None:
        for name in ("frozen_after", "retrain", "evict_after"):
            value = getattr(self, name)
            require(value >= 0, f"--{name}={value}; it must not be negative")
        require(0 < self.decay_sums <= 1, f"--decay_sums={self.decay_sums:g}; it must be above 0, and 1 at most")


class Online:
    """What stays fixed during one call of `validate_progressively`."""

    def __init__(self, config: RunConfig, options: OnlineOptions, workdir: pathlib.Path) -> None:
        self.config, self.options, self.workdir = config, options, workdir
        self.opened = open_run(config, workdir)
        self.dataset = self.opened.dataset
        self.periods = periods_of(self.dataset)
        if options.periods:
            self.periods = between(self.periods, options.periods)
        last = len(self.periods) - 1
        require(last >= 1, f"there is one period, {self.periods[0].name}: it takes two to score a trained model")
        require(
            options.frozen_after <= last,
            f"--frozen_after={options.frozen_after}; behind it must be one of {last + 1} periods",
        )
        self.rows = [rows_of_period(self.dataset, period) for period in self.periods]
        self.placed = self.opened.place(checkpoint.COPIES)
        cut = Cut(config.batch_size, multiple=self.placed.num_devices * config.num_micro_batches, shard=process_shard())
        self.feed = make_feed(self.placed, self.dataset, self.dataset.splits["train"], cut)
        # Of one size for all periods that are not smaller: the scoring step is compiled once.
        typical = sorted(map(len, self.rows))[len(self.rows) // 2]
        self.evaluate = Evaluator(
            dataclasses.replace(config, eval_batch_size=min(config.eval_batch_size, typical)), self.placed, self.dataset
        )
        self.decay = None if options.decay_sums == 1 else make_decay(self.placed, options.decay_sums)
        after = options.evict_after
        self.evict = Eviction(self.placed, self.dataset, self.rows, after) if after else None
        self._stepper: Stepper | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for a run to go on, as JSON has it."""
        chosen = {key: value for key, value in dataclasses.asdict(self.options).items() if key != "retrain"}
        return chosen | {"periods": [period.name for period in self.periods]}

    def scores(self, state: TrainState, number: int) -> dict[str, Any]:
        """The metrics of a state on a period."""
        values = self.evaluate(state, self.rows[number])
        return reporting.json_ready({name: values.get(name) for name in reporting.METRIC_COLUMNS})

    def steps(self, rows: Rows) -> int:
        """Batches of one pass."""
        return steps_per_epoch(len(rows), self.config.batch_size)

    def stepper(self, windows: Any) -> Stepper:
        """Steps through other windows with what is compiled already."""
        if self._stepper is None:
            self._stepper = Stepper(self.config, self.placed, self.feed, windows)
        else:
            self._stepper.go_on_with(windows)
        return self._stepper

    def passes(self, first: int) -> Iterator[Iterator[Any]]:
        """One pass over each period from number `first` on, in order; then the last one, for who reads ahead."""
        numbers = itertools.chain(range(first, len(self.rows)), itertools.repeat(len(self.rows) - 1))
        return (self.rows[n].sources(self.config.seed, n, self.config.shuffle) for n in numbers)


def validate_progressively(
    config: RunConfig,
    options: OnlineOptions,
    workdir: pathlib.Path,
    flagfile: str | None = None,
    open_model: OpenModel | None = None,
) -> dict[str, Any]:
    """Score and train on period after period, or go on with it, in `workdir`; what `online.json` says."""
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
            _live(run, state, progress, checkpoints, log, stop)
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
) -> None:
    """Score each period that is left, and train on it."""
    done, scores, step = progress.online["done"], progress.online["scores"], int(state.step)
    if done == len(run.periods):
        return
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
            state = _train(run, train_step, losses, state, step, run.steps(run.rows[number]), stop)
            step += run.steps(run.rows[number])
            if run.decay is not None:
                state = run.decay(state)
            if run.evict is not None:
                state, evicted = run.evict(state, number)
                scores[run.periods[number].name][EVICTED] = evicted
                _LOG.info("%s: %s rows evicted", run.periods[number].name, f"{sum(evicted.values()):,}")
            progress.losses = losses.held()
            if number + 1 == run.options.frozen_after:
                for later in range(number + 1, len(run.periods)):
                    _score(run, scores, FROZEN, state, later)
            progress.online["done"] = number + 1
            record = {"identity": run.opened.identity, "progress": dataclasses.asdict(progress)}
            checkpoints.save(checkpoint.LATEST, state, run.placed, record | {"schema": run.dataset.schema})
            _write_results(run, progress)


def _train(
    run: Online, train_step: Stepper, losses: Losses, state: TrainState, step: int, count: int, stop: list[int]
) -> TrainState:
    """`count` steps from `step` on. Interrupted after a signal: what is saved is the period before."""
    end = step + count
    while step < end:
        taken, state = train_step(state, step, end - step)
        step += taken
        if step < end and train_step.at_window_end:
            losses.push(train_step.record, step)
        asked = processes.count() == 1 or train_step.at_window_end or step == end
        if asked and (signum := processes.largest(stop[0] if stop else 0)):
            raise Interrupted(signum, step)
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
