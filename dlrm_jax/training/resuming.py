"""Where a training begins: at the workdir's last checkpoint, if the workdir is of the same run, or afresh."""

import logging
from typing import Any

from dlrm_jax.config import ConfigError, differences, from_dict, tell
from dlrm_jax.host import huge_pages
from dlrm_jax.training import checkpoint, reporting
from dlrm_jax.training.beginning import begin
from dlrm_jax.training.origin import OpenModel
from dlrm_jax.training.progress import Progress, stopping
from dlrm_jax.training.run import Run
from dlrm_jax.training.run_config import identity_of
from dlrm_jax.training.state import TrainState

_LOG = logging.getLogger("dlrm_jax")


def restore_or_begin(
    run: Run, checkpoints: checkpoint.Checkpoints, open_model: OpenModel | None
) -> tuple[TrainState, Progress]:
    """The last checkpoint of this workdir, or a first state; ConfigError if the workdir belongs to another run."""
    if checkpoints.step(checkpoint.LATEST) is None:
        state, begun = begin(run.config, run.workdir, run.placed, run.dataset, open_model)
        return state, Progress(begun=begun)
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
    _LOG.info("resumed at step %d of %d", int(state.step), progress.begun.step + run.num_steps)
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
    if progress.online:
        raise ConfigError(f"{run.workdir} holds a run of dlrm_jax.online; choose another --workdir, or --init_from it")
    progress.begun.require_same(config, run.workdir)
    own = step - progress.begun.step
    if own > run.num_steps:
        raise ConfigError(
            f"{run.workdir} is at step {own} already, beyond the {run.num_steps} asked for; nothing was changed. "
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
