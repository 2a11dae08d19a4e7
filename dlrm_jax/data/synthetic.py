"""Synthetic logs for benchmarks: ids of a chosen skew, or of a chosen reuse; labels are coin flips.

Skew: the id of frequency rank k (1-based; ids are ranks, so id 0 is the most frequent) occurs in proportion to k^-skew,
drawn by inverting the continuous law, P(rank <= k) ~ integral from 1 to k + 1. Reuse: see trace.py.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError, FeatureConfig, require
from dlrm_jax.data import trace
from dlrm_jax.data.dataset import Dataset, Split
from dlrm_jax.data.windows import GeneratedSplit

DEFAULT_EXAMPLES = 1_000_000
_BLOCK_ROWS = 65_536
_POSITIVE_RATE = 0.25


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and law of a synthetic log; `hotness` of one number stands for all features."""

    num_dense: int
    table_sizes: tuple[int, ...]
    hotness: tuple[int, ...] = (1,)
    id_skew: float = 1.05
    id_trace: str = ""

    def __post_init__(self) -> None:
        require(self.num_dense >= 1, f"num_dense is {self.num_dense}; it must be at least 1")
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


def rank_of(xp: Any, u: Any, rows: int, skew: float) -> Any:
    """Ids (ranks from 0) for uniform numbers u in [0, 1), computed with numpy or jax.numpy."""
    top = rows + 1.0
    if abs(skew - 1) < 1e-9:
        rank = xp.exp(u * np.log(top)) - 1
    else:
        rank = (1 + u * (top ** (1 - skew) - 1)) ** (1 / (1 - skew)) - 1
    return xp.clip(xp.floor(rank), 0, rows - 1).astype(xp.int32)


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
        name: GeneratedSplit(bounds[i], bounds[i + 1] - bounds[i], _BLOCK_ROWS, make)
        for i, name in enumerate(("train", "val", "test"))
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
            columns.append(rank_of(np, rng.random((_BLOCK_ROWS, hotness)), rows, spec.id_skew))
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

    from dlrm_jax.batch import Batch

    require(not spec.id_trace, "ids of a trace are made on the host only; leave id_trace out")
    dense_key, label_key, *id_keys = jax.random.split(key, 2 + len(spec.table_sizes))
    columns = [
        rank_of(jnp, jax.random.uniform(id_key, (batch_size, hotness)), rows, spec.id_skew)
        for id_key, rows, hotness in zip(id_keys, spec.table_sizes, spec.bag_sizes, strict=True)
    ]
    return Batch(
        dense_BxN=jax.random.uniform(dense_key, (batch_size, spec.num_dense)),
        ids_BxK=jnp.concatenate(columns, axis=1),
        label_B=jax.random.bernoulli(label_key, _POSITIVE_RATE, (batch_size,)).astype(jnp.float32),
        weight_B=jnp.ones((batch_size,)),
    )
