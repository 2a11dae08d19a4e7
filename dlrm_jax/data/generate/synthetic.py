"""Synthetic logs for benchmarks: ids of a chosen skew, or of a chosen reuse; labels are coin flips.

Skew: the id of frequency rank k (1-based; ids are ranks, so id 0 is the most frequent) occurs in proportion to k^-skew,
drawn by inverting the continuous law, P(rank <= k) ~ integral from 1 to k + 1. Reuse: see trace.py.

On a device there are float32 numbers only, of which uniform ones have 23 bits: they reach 8 million rows. There ids are
drawn in whole numbers: a segment of neighbouring ranks by its probability, and one of its ranks, all alike. A segment
is one rank where ranks differ much; within one the law falls by a factor of at most 1 + 2^-8.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError, FeatureConfig, require
from dlrm_jax.data.generate import trace
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.data.read.windows import GeneratedSplit
from dlrm_jax.data.schema.schema import SPLITS

DEFAULT_EXAMPLES = 1_000_000
_BLOCK_ROWS = 65_536
_POSITIVE_RATE = 0.25
_SEGMENT_FALL = 1 + 2**-8


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and law of a synthetic log; `hotness` of one number stands for all features."""

    num_dense: int
    table_sizes: tuple[int, ...]
    hotness: tuple[int, ...] = (1,)
    id_skew: float = 1.05
    id_trace: str = ""

    def __post_init__(self) -> None:
        require(self.num_dense >= 0, f"num_dense is {self.num_dense}; it must not be negative")
        require(bool(self.table_sizes) and min(self.table_sizes) >= 1, f"table_sizes is {self.table_sizes}; at least 1")
        require(self.id_skew >= 0, f"id_skew is {self.id_skew}; it must not be negative (0: uniform)")
        require(bool(self.hotness) and min(self.hotness) >= 1, f"hotness is {self.hotness}; at least 1")
        require(
            len(self.hotness) in (1, len(self.table_sizes)),
            f"hotness has {len(self.hotness)} numbers for {len(self.table_sizes)} tables; give one, or one for each",
        )

    @property
    def bag_sizes(self) -> tuple[int, ...]:
        """Hotness of each feature."""
        return self.hotness if len(self.hotness) > 1 else self.hotness * len(self.table_sizes)


def rank_of(u: np.ndarray, rows: int, skew: float) -> np.ndarray:
    """Ids (ranks from 0) for uniform numbers u in [0, 1) of float64."""
    top = rows + 1.0
    if abs(skew - 1) < 1e-9:
        rank = np.exp(u * np.log(top)) - 1
    else:
        rank = (1 + u * (top ** (1 - skew) - 1)) ** (1 / (1 - skew)) - 1
    return np.clip(np.floor(rank), 0, rows - 1).astype(np.int32)


def _cumulative(k: np.ndarray, rows: int, skew: float) -> np.ndarray:
    """P(rank < k), by the continuous law."""
    if abs(skew - 1) < 1e-9:
        return np.log(k + 1.0) / np.log(rows + 1.0)
    return ((k + 1.0) ** (1 - skew) - 1) / ((rows + 1.0) ** (1 - skew) - 1)


@functools.cache
def segments(rows: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """(first ranks of the segments, and `rows`; P(rank < first) of all but the first segment, in 2^-32)."""
    fall = _SEGMENT_FALL ** (1 / skew) if skew > 0 else float("inf")
    first = [0]
    while first[-1] < rows:
        first.append(min(rows, max(first[-1] + 1, int(min((first[-1] + 1) * fall, rows + 1.0)) - 1)))
    below = np.floor(_cumulative(np.array(first[1:-1], np.float64), rows, skew) * 2**32)
    return np.array(first, np.int32), np.minimum(below, 2**32 - 1).astype(np.uint32)


def _device_ids(key: Any, shape: tuple[int, int], rows: int, skew: float) -> Any:
    """int32 ids (ranks from 0), drawn on the device from 96 random bits each."""
    import jax
    import jax.numpy as jnp

    first, below = segments(rows, skew)
    choice, high, low = jax.random.bits(key, (3, *shape), jnp.uint32)
    segment = jnp.searchsorted(below, choice, side="right") if len(below) else jnp.zeros(shape, jnp.int32)
    start, stop = jnp.asarray(first)[segment], jnp.asarray(first)[segment + 1]
    return start + _below(high, low, (stop - start).astype(jnp.uint32)).astype(jnp.int32)


def _below(high: Any, low: Any, bound: Any) -> Any:
    """floor((high * 2^32 + low) * bound / 2^64) in 32-bit words: a number below `bound`, all as likely as can be."""
    over, rest = _product(high, bound)
    carried, _ = _product(low, bound)
    return over + ((rest + carried) < rest).astype(over.dtype)


def _product(a: Any, b: Any) -> tuple[Any, Any]:
    """(upper, lower) 32 bits of a * b, from 16-bit halves."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    other = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (other >> 16), a * b


def generate(spec: Spec, seed: int, num_examples: int = DEFAULT_EXAMPLES) -> Dataset:
    """A log of `num_examples` rows, 80 % train, 10 % val, 10 % test, made as it is read: it takes no memory."""
    require(num_examples >= 10, f"num_examples is {num_examples}; a synthetic log needs at least 10 for its splits")
    names = [f"f{i}" for i in range(len(spec.table_sizes))]
    traces = _traces(spec)
    make = (
        functools.cache(lambda index: _block(spec, traces, seed, index))
        if traces
        else functools.partial(_block, spec, None, seed)
    )
    bounds = [0, int(num_examples * 0.8), int(num_examples * 0.9), num_examples]
    splits = {
        name: GeneratedSplit(bounds[i], bounds[i + 1] - bounds[i], _BLOCK_ROWS, make) for i, name in enumerate(SPLITS)
    }
    return Dataset(
        name="synthetic",
        dense_names=tuple(f"dense_{i}" for i in range(spec.num_dense)),
        features=tuple(FeatureConfig(name, name, h) for name, h in zip(names, spec.bag_sizes, strict=True)),
        table_sizes=dict(zip(names, spec.table_sizes, strict=True)),
        splits=splits,
        checksum=f"{dataclasses.astuple(spec)}-{seed}-{num_examples}",
    )


def _traces(spec: Spec) -> list[trace.Distribution] | None:
    if not spec.id_trace:
        return None
    paths = [spec.id_trace.replace("{}", str(i)) for i in range(len(spec.table_sizes))]
    found = [trace.read_distribution(path) for path in paths]
    for path, rows, distribution in zip(paths, spec.table_sizes, found, strict=True):
        if max(distribution.accesses) >= rows:
            raise ConfigError(f"{path} has id {max(distribution.accesses)}, outside a table of {rows} rows")
    return found


def _block(spec: Spec, traces: list[trace.Distribution] | None, seed: int, index: int) -> Split:
    """Block `index` of the log, from (seed, index) alone; a trace begins anew in each block."""
    rng = np.random.default_rng((seed, 1, index))
    columns = []
    for f, (rows, hotness) in enumerate(zip(spec.table_sizes, spec.bag_sizes, strict=True)):
        if traces is None:
            columns.append(rank_of(rng.random((_BLOCK_ROWS, hotness)), rows, spec.id_skew))
        else:
            drawn = trace.generate(traces[f], _BLOCK_ROWS * hotness, rng)
            columns.append(drawn.astype(np.int32).reshape(_BLOCK_ROWS, hotness))
    return Split(
        dense_RxN=rng.random((_BLOCK_ROWS, spec.num_dense), np.float32),
        ids_RxK=np.concatenate(columns, axis=1),
        label_R=(rng.random(_BLOCK_ROWS) < _POSITIVE_RATE).astype(np.float32),
        row_R=np.arange(index * _BLOCK_ROWS, (index + 1) * _BLOCK_ROWS),
    )


def device_batch(spec: Spec, batch_size: int, key: Any) -> Any:
    """A Batch drawn on the device, from a jax.random key; call it inside jit. For benchmarks that leave input out."""
    import jax
    import jax.numpy as jnp

    from dlrm_jax.data.batch import Batch

    require(not spec.id_trace, "ids of a trace are made on the host only; leave id_trace out")
    dense_key, label_key, *id_keys = jax.random.split(key, 2 + len(spec.table_sizes))
    columns = [
        _device_ids(id_key, (batch_size, hotness), rows, spec.id_skew)
        for id_key, rows, hotness in zip(id_keys, spec.table_sizes, spec.bag_sizes, strict=True)
    ]
    return Batch(
        dense_BxN=jax.random.uniform(dense_key, (batch_size, spec.num_dense)),
        ids_BxK=jnp.concatenate(columns, axis=1),
        label_B=jax.random.bernoulli(label_key, _POSITIVE_RATE, (batch_size,)).astype(jnp.float32),
        weight_B=jnp.ones((batch_size,)),
    )
