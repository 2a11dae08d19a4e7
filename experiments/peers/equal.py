"""Whether a peer computes what we do, before its time is taken."""

from typing import Any

import numpy as np

from dlrm_jax.data.batch import Batch

from .ours import Ours

STEPS_CHECKED = 3
LOGIT_TOLERANCE, WEIGHT_TOLERANCE = 2e-4, 2e-5


class UnequalError(Exception):
    """A peer's numbers are not ours."""


def largest_difference(ours: Ours, peer: Any) -> float:
    """Between two sides' weights, all of them."""
    mine, theirs = ours.dense_weights(), peer.dense_weights()
    pairs = [pair for part in mine for pair in zip(mine[part], theirs[part], strict=True)]
    worst = max(float(np.abs(a - b).max()) for a, b in pairs)
    return max([worst, *(float(np.abs(a - b).max()) for a, b in zip(ours.tables(), peer.tables(), strict=True))])


def check_equal(what: str, ours: Ours, peer: Any, batches: list[Batch]) -> dict[str, float]:
    """Largest differences of logits before and after some steps, of weights after; UnequalError where large."""

    def of_logits() -> float:
        theirs = peer.host(peer.forward(peer.batch(batches[0])))
        mine = np.asarray(ours.forward(batches[0]))
        return float(np.abs(mine - theirs).max() / max(1.0, np.abs(mine).max()))

    found = {"logits_before": of_logits()}
    for batch in batches[:STEPS_CHECKED]:
        ours.train_step(batch)
        peer.train_step(peer.batch(batch))
    found |= {"logits_after": of_logits(), "weights_after": largest_difference(ours, peer)}
    print(f"{what}: " + ", ".join(f"{name} differ by {value:.1e}" for name, value in found.items()), flush=True)
    if reason := unequal(found):
        raise UnequalError(f"{what}: {reason}")
    return found


def unequal(found: dict[str, float]) -> str:
    """Why `check_equal`'s differences are those of another model; empty if they are not."""
    logits = max(found["logits_before"], found["logits_after"])
    if logits <= LOGIT_TOLERANCE and found["weights_after"] <= WEIGHT_TOLERANCE:
        return ""
    return f"not equal to ours: logits differ by {logits:.1e}, weights by {found['weights_after']:.1e}"
