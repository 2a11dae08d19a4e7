"""What becomes of a number that needs nothing but itself: functions of a column by name, `(numbers) -> numbers`.

They get float64 with NaN where a value is missing, and may give NaN or an infinity where they are not defined: such a
row is refused. Preparation and serving call the same. One of one's own is registered under a name, which the schema's
`transform:` then gives:

    @register("sqrt")
    def sqrt(numbers):
        return np.sqrt(numbers)
"""

from collections.abc import Callable

import numpy as np

from dlrm_jax.host.registry import Registry

Transform = Callable[[np.ndarray], np.ndarray]
TRANSFORMS: Registry[Transform] = Registry("transform", "dlrm_jax.dense_transforms")
register = TRANSFORMS.register

OF_STATISTICS = ("torchrec_log", "standardise")
"""Transforms that need the whole column (dense.py)."""


@register("none")
def none(numbers: np.ndarray) -> np.ndarray:
    """The number."""
    return numbers


@register("log1p")
def log1p(numbers: np.ndarray) -> np.ndarray:
    """log(max(x, 0) + 1), in float32 from before the logarithm, as the reference computes it."""
    return np.log(np.maximum(numbers, 0).astype(np.float32) + 1)


@register("nvidia_log")
def nvidia_log(numbers: np.ndarray) -> np.ndarray:
    """log(x + 3), as DeepLearningExamples."""
    return np.log(numbers + 3)


def names() -> tuple[str, ...]:
    """All transforms, also those of statistics."""
    return (*TRANSFORMS.all(), *OF_STATISTICS)
