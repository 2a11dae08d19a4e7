"""Which bucket a number lies in: rules that make a category of a number, by name, `(numbers) -> whole numbers`.

They get float64 without NaN, and may give NaN or an infinity where they are not defined: such a row is refused.
Preparation and serving call the same. One of one's own is registered under a name, which the schema's `buckets:` then
gives:

    @register("tens")
    def tens(numbers):
        return np.floor(numbers / 10)

`quantile` is no such function: its edges come from the whole log (`edges`), and lie with what is prepared and exported.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dlrm_jax.host.registry import Registry

Rule = Callable[[np.ndarray], np.ndarray]
BUCKETS: Registry[Rule] = Registry("rule of buckets", "dlrm_jax.bucket_rules")
register = BUCKETS.register

QUANTILE = "quantile"
_LARGEST = 2.0**53
"""Beyond it not every whole number is a float64."""


@register("log_squared")
def log_squared(numbers: np.ndarray) -> np.ndarray:
    """floor(log(x)^2) of x > 2, else x without its fraction: as FuxiCTR's convert_to_bucket for Criteo_x4, after the
    winners of that contest (reczoo/FuxiCTR, fuxictr/datasets/criteo.py)."""
    return np.where(numbers > 2, np.floor(np.log(numbers) ** 2), np.trunc(numbers))


def names() -> tuple[str, ...]:
    """All rules, also that of quantiles."""
    return (*BUCKETS.all(), QUANTILE)


def bucket(name: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 of each number, 0 where it has none; whether it has none) under a rule; there is no NaN among them."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = np.asarray(BUCKETS.get(name)(numbers), np.float64)
        undefined = ~(np.abs(found) <= _LARGEST) | (found != np.floor(found))
    return np.where(undefined, 0, found).astype(np.int64), undefined


def edges(numbers_V: np.ndarray, counts_V: np.ndarray, size: int) -> np.ndarray:
    """Where distinct numbers, each so many times there, are cut into `size` parts of about equally many.

    At most size - 1 edges, rising; number x is in the bucket of the first edge that is >= x, the last if none is.

    Edge k is the least number that k / size of all do not exceed. Equal edges, as of a number that is more than a part
    of all, are one, so that there are fewer buckets.
    """
    order = np.argsort(numbers_V)
    upto_V = np.cumsum(counts_V[order], dtype=np.int64)
    if not len(upto_V) or not upto_V[-1]:
        return np.zeros(0)
    wanted = np.arange(1, size, dtype=np.int64) * int(upto_V[-1])
    return np.unique(numbers_V[order][np.searchsorted(upto_V * size, wanted)])


def among(edges_E: Sequence[float] | np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int32 bucket of each number."""
    return np.searchsorted(edges_E, numbers).astype(np.int32)
