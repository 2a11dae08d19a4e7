"""Synthetic logs for benchmarks: ids of a chosen skew, or of a chosen reuse; labels are coin flips.

Skew (power_law.py): a row is a function of (seed, its number) in whole numbers, so that it can be made anywhere and has
the same bits there: by NumPy where the host wants it, and in a step, which then needs its number alone. Of a row's
number in 32-bit words (high, low), with s and a from the seed and `mix` a hash, word w of the row is

    h = mix(high ^ s0);  x = mix(low + h);  y = mix((low ^ s1) - h);  mix((x ^ a_w) + y)

Reuse (trace.py): each id depends on all before it, so that blocks are made by the host, one after the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ConfigError, FeatureConfig, require
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.generate import trace
from dlrm_jax.data.generate.power_law import Law, draw, law_of
from dlrm_jax.data.read.dataset import Columns, Dataset, Split
from dlrm_jax.data.read.pipeline import made_batch
from dlrm_jax.data.read.windows import GeneratedSplit, made_by_host
from dlrm_jax.data.schema.schema import SPLITS
from dlrm_jax.model.hashing import mix

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


@dataclasses.dataclass(frozen=True)
class Log:
    """The rows of a log without a trace, each a function of (spec, seed, its number)."""

    spec: Spec
    seed: int

    def __post_init__(self) -> None:
        require(not self.spec.id_trace, "ids of a trace are made on the host only; leave id_trace out")

    @functools.cached_property
    def _keys(self) -> list[np.ndarray]:
        """s; and a of the words of dense columns, label, ids' segments, ids within their segments."""
        ids = sum(self.spec.bag_sizes)
        sizes = [2, self.spec.num_dense, 1, ids, ids]
        words = np.random.SeedSequence((self.seed, 2)).generate_state(sum(sizes))
        return np.split(words, np.cumsum(sizes)[:-1])

    @functools.cached_property
    def _law(self) -> Law:
        return law_of(np.repeat(self.spec.table_sizes, self.spec.bag_sizes), self.spec.id_skew)

    def __call__(self, xp: Any, position_B: Any, first: int = 0) -> Columns:
        """Rows `first` + `position_B`, positions being below 2^32; see dataset.Maker."""
        seed, *keys = self._keys
        low_B = position_B.astype(xp.uint32) + np.uint32(first % 2**32)
        high_B = (low_B < np.uint32(first % 2**32)).astype(xp.uint32) + np.uint32(first >> 32)
        high_B = mix(high_B ^ seed[0])
        x_Bx1, y_Bx1 = mix(low_B + high_B)[:, None], mix((low_B ^ seed[1]) - high_B)[:, None]
        dense_BxN, label_Bx1, choice_BxK, place_BxK = (mix((x_Bx1 ^ key_W[None]) + y_Bx1) for key_W in keys)
        return (
            (dense_BxN >> 8).astype(xp.float32) * np.float32(2**-24),
            draw(xp, self._law, choice_BxK, place_BxK),
            (label_Bx1[:, 0] < np.uint32(_POSITIVE_RATE * 2**32)).astype(xp.float32),
        )


def generate(spec: Spec, seed: int, num_examples: int = DEFAULT_EXAMPLES) -> Dataset:
    """A log of `num_examples` rows, 80 % train, 10 % val, 10 % test, made as it is read: it takes no memory."""
    require(num_examples >= 10, f"num_examples is {num_examples}; a synthetic log needs at least 10 for its splits")
    names = [f"f{i}" for i in range(len(spec.table_sizes))]
    log = None if spec.id_trace else Log(spec, seed)
    make = functools.partial(_block, log) if log else functools.cache(_traced(spec, seed))
    bounds = [0, int(num_examples * 0.8), int(num_examples * 0.9), num_examples]
    splits = {
        name: GeneratedSplit(first, stop - first, _BLOCK_ROWS, make, log and functools.partial(log, first=first))
        for name, first, stop in zip(SPLITS, bounds, bounds[1:], strict=False)
    }
    return Dataset(
        name="synthetic",
        dense_names=tuple(f"dense_{i}" for i in range(spec.num_dense)),
        features=tuple(FeatureConfig(name, name, h) for name, h in zip(names, spec.bag_sizes, strict=True)),
        table_sizes=dict(zip(names, spec.table_sizes, strict=True)),
        splits=splits,
        checksum=f"{dataclasses.astuple(spec)}-{seed}-{num_examples}{'-hashed' if log else ''}",
    )


def _block(log: Log, index: int) -> Split:
    """Block `index` of a log, by the host."""
    first = index * _BLOCK_ROWS
    columns = made_by_host(functools.partial(log, first=first), np.arange(_BLOCK_ROWS))
    return Split(*columns, row_R=np.arange(first, first + _BLOCK_ROWS))


def _traces(spec: Spec) -> list[trace.Distribution]:
    paths = [spec.id_trace.replace("{}", str(i)) for i in range(len(spec.table_sizes))]
    found = [trace.read_distribution(path) for path in paths]
    for path, rows, distribution in zip(paths, spec.table_sizes, found, strict=True):
        if max(distribution.accesses) >= rows:
            raise ConfigError(f"{path} has id {max(distribution.accesses)}, outside a table of {rows} rows")
    return found


def _traced(spec: Spec, seed: int) -> Callable[[int], Split]:
    """What makes block `index` of a log whose ids follow traces, which begin anew in each block."""
    traces = _traces(spec)

    def block(index: int) -> Split:
        rng = np.random.default_rng((seed, 1, index))
        columns = [
            trace.generate(one, _BLOCK_ROWS * hotness, rng).astype(np.int32).reshape(_BLOCK_ROWS, hotness)
            for one, hotness in zip(traces, spec.bag_sizes, strict=True)
        ]
        return Split(
            dense_RxN=rng.random((_BLOCK_ROWS, spec.num_dense), np.float32),
            ids_RxK=np.concatenate(columns, axis=1),
            label_R=(rng.random(_BLOCK_ROWS) < _POSITIVE_RATE).astype(np.float32),
            row_R=np.arange(index * _BLOCK_ROWS, (index + 1) * _BLOCK_ROWS),
        )

    return block


def device_batch(spec: Spec, seed: int, batch_size: int, number: Any = 0) -> Batch:
    """Batch `number` of a log, in its order; call it inside jit. For benchmarks that leave input out."""
    return made_batch(jnp, Log(spec, seed), jnp.arange(batch_size) + number * batch_size)
