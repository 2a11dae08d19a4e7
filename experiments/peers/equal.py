"""Whether a peer computes what we do, before its time is taken."""

from typing import Any

import numpy as np

from dlrm_jax.data.batch import Batch

from .ours import Ours

STEPS_CHECKED = 3
LOGIT_TOLERANCE, AFTER_TOLERANCE, WEIGHT_TOLERANCE = 2e-4, 2e-3, 1e-4
"""Of logits before and after steps, and of weights after steps of 0.01 by Adagrad.

A ReLU whose input rounds to the other side of 0 gives its example another gradient, and Adagrad makes a step of it.
"""


def largest_difference(ours: Ours, peer: Any) -> float:
    """Between two sides' weights, all of them."""
    mine, theirs = ours.dense_weights(), peer.dense_weights()
    pairs = [pair for part in mine for pair in zip(mine[part], theirs[part], strict=True)]
    worst = max(float(np.abs(a - b).max()) for a, b in pairs)
    return max([worst, *(float(np.abs(a - b).max()) for a, b in zip(ours.tables(), peer.tables(), strict=True))])


def check_equal(what: str, ours: Ours, peer: Any, batches: list[Batch]) -> dict[str, float]:
    """Largest differences of logits before and after some steps and of weights after; exits where they are large."""

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
    most = {"logits_before": LOGIT_TOLERANCE, "logits_after": AFTER_TOLERANCE, "weights_after": WEIGHT_TOLERANCE}
    if any(found[name] > tolerance for name, tolerance in most.items()):
        raise SystemExit(f"{what} is not equal to ours: {found}")
    return found
