"""How far a run got, as its checkpoints keep it, and whether its rules end it there."""

import dataclasses
from typing import Any

from dlrm_jax.training import plateau
from dlrm_jax.training.beginning import Begun
from dlrm_jax.training.run_config import RunConfig


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
    """Losses since the last line of the log (monitor.Losses)."""
    stall: plateau.Stall = dataclasses.field(default_factory=plateau.Stall)
    """Evaluations without a gain, after which the rate is cut."""
    earlier_schedules: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Where the run went on with another learning rate: the settings it had before, and `until_step`."""
    begun: Begun = dataclasses.field(default_factory=Begun)
    online: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How far a run period by period is (online.py); empty for a run that it is not."""


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
