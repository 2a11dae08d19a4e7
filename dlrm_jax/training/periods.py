"""What stays fixed in a progressive validation (online.py): its periods, their rows, what scores and steps."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from dlrm_jax.config import require
from dlrm_jax.data.read.dataset import Rows
from dlrm_jax.data.read.periods import between, periods_of, rows_of_period
from dlrm_jax.data.read.pipeline import Cut, process_shard, steps_per_epoch
from dlrm_jax.training import checkpoint, reporting
from dlrm_jax.training.evaluation import Evaluator
from dlrm_jax.training.evicting import Eviction
from dlrm_jax.training.feed import make_feed
from dlrm_jax.training.forgetting import make_decay
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.stepper import Stepper


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
