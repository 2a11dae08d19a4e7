"""A run in MLPerf's training log format: lines `:::MLLOG {json}`, as the compliance checker of mlcommons/logging reads.

What has no counterpart in a run is left out; docs/RECORDS.md says what that is. A process that goes on from a
checkpoint writes a file of its own, as the rules allow one start of a run in a file.
"""

import contextlib
import json
import pathlib
import time
from types import TracebackType
from typing import Any, NamedTuple, TextIO

import jax

from dlrm_jax.config import ConfigError, ModelConfig
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.tables.rules import Adagrad, Bounded, RowwiseAdagrad
from dlrm_jax.training.record_options import Submission
from dlrm_jax.training.reporting import MetricsLog
from dlrm_jax.training.run_config import RunConfig

_START, _END, _POINT = "INTERVAL_START", "INTERVAL_END", "POINT_IN_TIME"
_CROSS = "cross"
"""The interaction of MLPerf's dlrm_dcnv2; its dlrm is any other."""


class Length(NamedTuple):
    """How long a run is: `rows` of an epoch, of which a step takes `batch_size`; `began_at` is the step before it."""

    rows: int
    batch_size: int
    began_at: int
    last_step: int
    eval_every: int

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch, the last one perhaps of fewer rows."""
        return -(-self.rows // self.batch_size)

    def samples(self, step: int) -> int:
        """Rows that were trained on behind so many steps."""
        epochs, steps = divmod(step - self.began_at, self.per_epoch)
        return epochs * self.rows + min(steps * self.batch_size, self.rows)

    def place(self, step: int) -> dict[str, Any]:
        """How far a step is, in epochs and in rows, by MLPerf's names."""
        return {"epoch_num": self.samples(step) / self.rows, "samples_count": self.samples(step)}

    def next_evaluation(self, step: int) -> int:
        """The first step beyond this one that evaluates."""
        own = step - self.began_at
        return min(self.last_step, step + self.eval_every - own % self.eval_every)


def path_of(workdir: pathlib.Path, resumed_at: int) -> pathlib.Path:
    """The file of a process that begins behind so many steps of the run."""
    return workdir / (f"mllog-from-step-{resumed_at}.txt" if resumed_at else "mllog.txt")


class MlperfLog:
    """Writes a run's log to `path`, each line on disk at once; nothing at all if there is none.

    A context manager, in which `facts` come first, with `init_seconds`, the Unix time at which it was begun to get
    ready. What ends after `begin` without `stop`, by a signal or an error, has `run_stop` with status aborted.
    """

    def __init__(
        self, path: pathlib.Path | None, length: Length, facts: dict[str, Any], init_seconds: float = 0.0
    ) -> None:
        self._path, self._length, self._facts, self._init_seconds = path, length, facts, init_seconds
        self._file: TextIO | None = None
        self._running = False
        self._step = self._epochs = 0
        self._epoch: int | None = None
        self._block: dict[str, Any] | None = None

    def __enter__(self) -> "MlperfLog":
        if self._path is not None:
            try:
                self._file = self._path.open("w")
            except OSError as error:
                raise self._not_written(error) from error
            self._line(_START, "init_start", None, self._init_seconds)
            for key, value in self._facts.items():
                self._line(_POINT, key, value)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        with contextlib.suppress(ConfigError):  # What ended the run is the error to tell.
            self.stop(self._step, success=False)
        if self._file is not None:
            self._file.close()

    def begin(self, step: int) -> None:
        """Ready, with no row of the training data trained on, `step` being where the run goes on."""
        self._line(_END, "init_stop", None)
        self._line(_START, "run_start", None, **self._length.place(step))
        self._running, self._step = True, step
        self._epochs = (step - self._length.began_at) // self._length.per_epoch

    def before(self, step: int) -> None:
        """`step` are done, and another one comes: of a new epoch, or behind an evaluation, perhaps."""
        if self._file is None:
            return
        if self._epoch is None:
            self._epoch = self._epochs + 1
            self._line(_START, "epoch_start", None, **self._length.place(step) | {"epoch_num": self._epoch})
        if self._block is None:
            now, then = self._length.place(step), self._length.place(self._length.next_evaluation(step))
            self._block = {"first_epoch_num": now["epoch_num"], "samples_count": now["samples_count"]}
            count = then["epoch_num"] - now["epoch_num"]
            self._line(_START, "block_start", None, **self._block, epoch_count=count)

    def after(self, step: int, state: Any) -> None:
        """`step` have been dispatched, with `state` behind them: waited for where they end an epoch."""
        self._step = step
        if self._file is None:
            return
        epochs = (step - self._length.began_at) // self._length.per_epoch
        if epochs > self._epochs:
            jax.block_until_ready(state.step)
            self._line(_END, "epoch_stop", None, **self._length.place(step) | {"epoch_num": epochs})
            self._epochs, self._epoch = epochs, None

    def evaluates(self, step: int) -> None:
        """Evaluation begins, all steps being done."""
        self._end_block(step)
        self._line(_START, "eval_start", None, **self._length.place(step))

    def evaluated(self, step: int, auc: float | None) -> None:
        """The AUC of all rows of val: what MLPerf calls the accuracy. None, of rows of one class, is no line."""
        if auc is not None and auc == auc:
            self._line(_POINT, "eval_accuracy", auc, **self._length.place(step))
        self._line(_END, "eval_stop", None, **self._length.place(step))

    def stop(self, step: int, success: bool) -> None:
        """The run is over; nothing where it is over already, or never began."""
        if self._running:
            self._running = False
            self._end_block(step)
            status = "success" if success else "aborted"
            self._line(_END, "run_stop", None, status=status, **self._length.place(step))

    def _end_block(self, step: int) -> None:
        if self._block is not None:
            first = self._block["first_epoch_num"]
            self._block = None
            self._line(_END, "block_stop", None, first_epoch_num=first, **self._length.place(step))

    def _line(self, kind: str, key: str, value: Any, seconds: float | None = None, **metadata: Any) -> None:
        if self._file is None:
            return
        milliseconds = round((time.time() if seconds is None else seconds) * 1000)
        line = {"namespace": "", "time_ms": milliseconds, "event_type": kind, "key": key, "value": value}
        try:
            self._file.write(f":::MLLOG {json.dumps(line | {'metadata': metadata})}\n")
            self._file.flush()
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"cannot write {self._path}: {error.strerror}; mend that, and the same command goes on from the last "
            "checkpoint"
        )


class Records(NamedTuple):
    """What a process of a run writes while it trains."""

    metrics: MetricsLog
    mlperf: MlperfLog


def facts_of(
    config: RunConfig, model: ModelConfig, submission: Submission, rows: dict[str, int], begins_at: int
) -> dict[str, Any]:
    """What the log says of a run before it starts, by MLPerf's keys; `rows` are those of each split."""
    schedule = config.optimizer.schedule
    devices = jax.devices()
    crosses = model.interaction.name == _CROSS
    known = {
        "submission_benchmark": submission.benchmark or ("dlrm_dcnv2" if crosses else "dlrm"),
        "submission_org": submission.org,
        "submission_division": submission.division,
        "submission_platform": submission.platform or f"{len(devices)}x {devices[0].device_kind}",
        **({"submission_status": submission.status} if submission.status else {}),
        "cache_clear": False,  # A run leaves the system's caches as they are.
        "seed": config.seed,
        "global_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.num_micro_batches,
        "train_samples": rows["train"],
        "eval_samples": rows["val"],
        "opt_base_learning_rate": schedule.learning_rate,
        "opt_learning_rate_warmup_steps": schedule.warmup_steps,
        "opt_learning_rate_decay_start_step": schedule.decay_start_step,
        "opt_learning_rate_decay_steps": schedule.decay_steps,
        **_optimizers(config, model),
    }
    return known | ({"init_checkpoint_step": begins_at} if begins_at else {})


def _optimizers(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """The MLPs' and the tables' optimizers: one name where they are one, and of Adagrad what is the same in all."""
    optimizer = config.optimizer
    described = [table.optimizer or optimizer.table for table in model.tables]
    names = dict.fromkeys([optimizer.dense, *(text.partition(",")[0] for text in described)])
    decays = (optimizer.weight_decay, optimizer.dense_l2, optimizer.table_l2, optimizer.table_weight_decay)
    found: dict[str, Any] = {"opt_name": "+".join(names), "opt_weight_decay": max(decays)}
    rules = [make_rule(optimizer, text) for text in dict.fromkeys(described)]
    adagrads = [rule for rule in map(_unbounded, rules) if isinstance(rule, Adagrad | RowwiseAdagrad)]
    epsilons = {rule.eps for rule in adagrads} | ({optimizer.eps} if optimizer.dense == "adagrad" else set())
    if len(epsilons) == 1:
        found["opt_adagrad_epsilon"] = epsilons.pop()
    if adagrads or optimizer.dense == "adagrad":
        # Sums begin at the first value of their slot, the MLPs' at 0 too; the rate falls by the schedule alone.
        found["opt_adagrad_initial_accumulator_value"] = max((rule.slots[0].first for rule in adagrads), default=0.0)
        found["opt_adagrad_learning_rate_decay"] = 0
    return found


def _unbounded(rule: Any) -> Any:
    return rule.rule if isinstance(rule, Bounded) else rule
