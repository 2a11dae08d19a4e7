"""Dataset: named columns and their splits; what every reader in this folder returns."""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from dlrm_jax.config import ConfigError, FeatureConfig
from dlrm_jax.data.schema.schema import SPLITS

Columns = tuple[Any, Any, Any]
"""Of some rows `dense_RxN` float32, `ids_RxK` int32, `label_R` float32."""
Maker = Callable[[Any, Any], Columns]
"""`(xp, position_R) -> columns`: rows from their positions alone, by numpy, or by jax.numpy, also in a jitted step.

The bits are the same: all is done in whole numbers. What needs a logarithm or a sum of floats, as labels by a hidden
model do, differs from platform to platform in the last bit; such rows are made once, by the host.
"""


class Rows(Protocol):
    """A split, in memory or not: rows that an epoch visits window by window."""

    def __len__(self) -> int:
        """Rows."""

    @property
    def only_label(self) -> int | None:
        """The label that all rows have, 0 or 1; None where there are both, or where nobody counted."""

    @property
    def maker(self) -> Maker | None:
        """What computes rows from their positions in `whole()`; None where they are read."""

    def windows(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple["Split", np.ndarray]]:
        """The epoch's rows from number `start` on: (rows in memory, the order in which to visit them), each row once.

        The order follows from (seed, epoch) alone; what lies before `start` is not read.
        """

    def sources(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple[Any, np.ndarray]]:
        """The same for batches: of what is on disk there may be `Unread` (unread.py) instead of rows in memory."""

    def positions(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[np.ndarray]:
        """The same visit by the rows' positions in `whole()`, without reading any."""

    def whole(self) -> "Split":
        """All rows, in memory, in their order."""


class BatchExpander(Protocol):
    """Makes bags of one-hot ids, on the host or in the step (multi_hot.py)."""

    @property
    def on_device(self) -> bool:
        """Whether `compute` is to be used, not `on_host`."""

    def on_host(self, ids_RxF: np.ndarray) -> np.ndarray:
        """The bags of some rows, on the host."""

    def compute(self, xp: Any, ids_RxF: Any) -> Any:
        """The same by `xp`, jax.numpy in a step; only where they are made `on_device`."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows in memory: `dense_RxN` float32, `ids_RxK` int32 (slots in feature order), `label_R` float32.

    `row_R` is each row's number in the raw log, so that predictions can be joined back; `weight_R`, where given, its
    weight in the loss and the metrics.
    """

    dense_RxN: np.ndarray
    ids_RxK: np.ndarray
    label_R: np.ndarray
    row_R: np.ndarray
    weight_R: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows = {len(column) for column in (self.dense_RxN, self.ids_RxK, self.label_R, self.row_R)}
        if len(rows) != 1:
            raise ConfigError(f"columns of one split differ in length: {sorted(rows)}")

    def __len__(self) -> int:
        return len(self.label_R)

    @property
    def only_label(self) -> int | None:
        """See Rows."""
        if not len(self) or self.label_R.min() != self.label_R.max():
            return None
        return int(self.label_R[0])

    @property
    def maker(self) -> None:
        """See Rows: they are here."""
        return None

    def windows(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple["Split", np.ndarray]]:
        """One window: all rows, in the order of a permutation from (seed, epoch)."""
        for order_R in self.positions(seed, epoch, shuffle, start):
            yield self, order_R

    sources = windows

    def positions(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[np.ndarray]:
        """See Rows."""
        order_R = np.random.default_rng((seed, epoch)).permutation(len(self)) if shuffle else np.arange(len(self))
        yield order_R[start:]

    def whole(self) -> "Split":
        """See Rows."""
        return self


@dataclasses.dataclass(frozen=True)
class Period:
    """A period that has rows: rows `first` to `first + rows` of its split. `start` is in the unit of the log."""

    name: str
    start: int
    split: str
    first: int
    rows: int
    positives: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A click log ready to train on.

    `table_sizes` maps table name to rows; `optimum`, where the data was planted, holds by split, and by period where
    there are `periods`, the AUC and log loss of the teacher's own probabilities, which no model can beat in
    expectation. `checksum` stands for all values where they are not in memory. `expander`, where given, makes bags of
    the one-hot ids, batch by batch.
    `schema` says what the raw log's columns were (schema_io.to_dict), which checkpoints keep; `directory` where it
    was prepared. `embedded_columns` are the numbers that its schema embeds.
    """

    name: str
    dense_names: tuple[str, ...]
    features: tuple[FeatureConfig, ...]
    table_sizes: Mapping[str, int]
    splits: Mapping[str, Rows]
    optimum: Mapping[str, Mapping[str, float]] | None = None
    checksum: str = ""
    expander: "BatchExpander | None" = None
    schema: Mapping[str, Any] | None = None
    directory: pathlib.Path | None = None
    periods: tuple[Period, ...] = ()
    embedded_columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in SPLITS:
            if name not in self.splits:
                raise ConfigError(f"dataset {self.name!r} has no {name!r} split")
        if len(self.splits["train"]) == 0:
            raise ConfigError(f"dataset {self.name!r} has no training rows")

    def fingerprint(self) -> str:
        """A checksum of every value, to tell whether a run continues on the data it began with."""
        if self.checksum:
            return self.checksum
        checksum = 0
        for name in SPLITS:
            split = self.splits[name]
            if not isinstance(split, Split):
                raise TypeError(f"split {name!r} is not in memory, and the dataset has no checksum")
            for column in (split.dense_RxN, split.ids_RxK, split.label_R, split.weight_R):
                if column is not None:
                    checksum = zlib.crc32(np.ascontiguousarray(column).data, checksum)
        return f"{checksum:08x}"
