"""Layers of an MLP with weights and inputs of 8 bits, as the C++ scorer has them: `--kernels=native_int8`.

Of a weight matrix each column has a scale of its own, and codes of -127 to 127. Of a layer's input each row has a scale
and a zero of its own, found when it is scored, and codes of 0 to 255; so a row's score does not depend on its batch.
What is summed are whole numbers, exact in 32 bits. (Jacob et al. 2018, "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", section 2; scales of columns: Krishnamoorthi 2018, section 3.)

    w = (0.50, -1.27)          scale 0.01, codes (50, -127), their sum -77
    x = (-1.0, 4.1)            scale 5.1 / 255 = 0.02, zero 50, codes (0, 255)
    0 * 50 - 255 * 127 = -32385;  0.01 * 0.02 * (-32385 - 50 * -77) = -5.707;  in float32 -0.5 - 5.207 = -5.707
"""

from typing import Any, NamedTuple

import numpy as np

from dlrm_jax.config import require
from dlrm_jax.serving.artifact.loaded import Noted
from dlrm_jax.serving.artifact.store import Version

MEASURED = "int8_layers"
"""What a manifest says that int8 layers change, of a version that was measured with them."""
NOTED = Noted("probability_int8", 1e-3)
"""Another processor rounds a layer's input otherwise in the last bit, which can make another code of it."""
MOST_CHANGE = 1e-4
"""Of AUC: a model that loses or gains more is not exported with them."""
_LEAST_INPUTS, _LEAST_OUTPUTS, _MOST_INPUTS = 64, 32, 1 << 16
"""Layers with fewer cost little, and what is left out of the first and the last ones weighs more. More: layers.h."""
_LARGEST = 127
TOO_NARROW = (
    f"--int8_layers: no layer of this model has {_LEAST_INPUTS} inputs and {_LEAST_OUTPUTS} outputs, so that none has "
    "8 bits"
)
"""What is said where nothing would be gained."""


class Coded(NamedTuple):
    """A matrix (in, out) as codes (in, out) int8 times scales (out,) float32; sums (out,) int32 of columns of codes."""

    codes: np.ndarray
    scales: np.ndarray
    sums: np.ndarray


def is_coded(inputs: int, outputs: int) -> bool:
    """Whether a layer of these sizes has 8 bits."""
    return _LEAST_INPUTS <= inputs <= _MOST_INPUTS and outputs >= _LEAST_OUTPUTS


def coded(kernel: np.ndarray) -> Coded:
    """A weight matrix (in, out) float32, each column by its largest number."""
    scales = (np.abs(kernel).max(axis=0) / _LARGEST).astype(np.float32)
    codes = np.rint(kernel / np.where(scales > 0, scales, 1)).astype(np.int8)
    return Coded(codes, scales, codes.sum(axis=0, dtype=np.int32))


def require_measured(version: Version) -> None:
    """ConfigError unless it is known what int8 layers change of this version's scores."""
    require(
        MEASURED in version.manifest,
        f"{version.directory}: what int8 layers change of its AUC was not measured; export it with --int8_layers, or "
        "use --kernels=native",
    )


def changes_of_auc(scores: dict[str, Any], int8_scores: dict[str, Any]) -> dict[str, float]:
    """AUC with int8 layers less that without, by split; ConfigError where one is larger than MOST_CHANGE.

    Splits that have no AUC, of no rows or of one label alone, are left out; one at least must have one.
    """
    of = {name: own["auc"] for name, own in scores.items() if own is not None and np.isfinite(own["auc"])}
    require(bool(of), "no split has an AUC, by which int8 layers would be measured; leave --int8_layers out")
    changes = {name: int8_scores[name]["auc"] - auc for name, auc in of.items()}
    for name, change in changes.items():
        require(
            abs(change) <= MOST_CHANGE,
            f"int8 layers move the AUC on {name} by {change:+.6f}, from {of[name]:.6f}, and at most {MOST_CHANGE:g} "
            "is accepted; leave --int8_layers out",
        )
    return changes
