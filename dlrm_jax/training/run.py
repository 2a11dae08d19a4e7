"""One call of the training: what stays fixed in it, and what it says of itself in its workdir."""

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.load import named
from dlrm_jax.data.read.pipeline import Cut, process_shard, steps_per_epoch
from dlrm_jax.host import files, processes
from dlrm_jax.training import checkpoint
from dlrm_jax.training.evaluation import Evaluator
from dlrm_jax.training.feed import Room, make_feed
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.progress import Progress
from dlrm_jax.training.run_config import EARLIER_SCHEDULES, RunConfig

_LOG = logging.getLogger("dlrm_jax")


class Run:
    """What stays fixed during one call of `train_and_evaluate`."""

    def __init__(self, config: RunConfig, workdir: pathlib.Path, progress: bool = True) -> None:
        self.config, self.workdir, self.init_seconds = config, workdir, time.time()
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
        room, multiple = Room(config, self.placed), self.placed.num_devices * config.num_micro_batches
        cut = Cut(config.batch_size, multiple=multiple, shard=process_shard())
        self.feed = make_feed(self.placed, self.dataset, self.dataset.splits["train"], cut, room, self.num_steps)
        self.evaluate = Evaluator(config, self.placed, self.dataset, room)
        self.writes = processes.is_first()
        self.shows = progress and self.writes
        self.began_at = 0

    @property
    def last_step(self) -> int:
        """The step at which the run ends; steps are counted from where it began, which may be beyond 0."""
        return self.began_at + self.num_steps

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
        """Steps from `step` to the next one that evaluates or saves, or the last."""
        own = step - self.began_at
        return min(self.num_steps - own, *(n - own % n for n in (self.eval_every, self.checkpoint_every)))


@contextlib.contextmanager
def the_only_training(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the workdir's lock, the first of several processes for all; ConfigError in all if it is taken."""
    refusal = f"another training is running in {workdir}"
    with processes.first_holds(files.alone(workdir / files.LOCK, refusal), refusal):
        yield


def config_of(run: Run, progress: Progress) -> dict[str, Any]:
    """What `config.json` says: the settings, the data by its own name, and what the schedule was before, if another."""
    config = dataclasses.replace(progress.begun.noted_in(run.config), data=named(run.config.data, run.dataset))
    earlier = {EARLIER_SCHEDULES: progress.earlier_schedules} if progress.earlier_schedules else {}
    return dataclasses.asdict(config) | earlier


def record_of(run: Run, progress: Progress) -> dict[str, Any]:
    """What a checkpoint says besides the state."""
    return {"identity": run.identity, "progress": dataclasses.asdict(progress), "schema": run.dataset.schema}
