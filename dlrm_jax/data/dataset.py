"""Dataset: named columns and their splits, in memory; what every reader in this folder returns."""

import dataclasses
import zlib
from collections.abc import Mapping

import numpy as np

from dlrm_jax.config import ConfigError, FeatureConfig

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one split: `dense_RxN` float32, `ids_RxK` int32 (slots in feature order), `label_R` float32.

    `row_R` is each row's number in the raw log, so that predictions can be joined back.
    """

    dense_RxN: np.ndarray
    ids_RxK: np.ndarray
    label_R: np.ndarray
    row_R: np.ndarray

    def __post_init__(self) -> None:
        rows = {len(column) for column in (self.dense_RxN, self.ids_RxK, self.label_R, self.row_R)}
        if len(rows) != 1:
            raise ConfigError(f"columns of one split differ in length: {sorted(rows)}")

    def __len__(self) -> int:
        return len(self.label_R)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A click log ready to train on.

    `table_sizes` maps table name to rows; `optimum`, where the data was planted, holds per split the AUC and
    log loss of the teacher's own probabilities, which no model can beat in expectation.
    """

    name: str
    dense_names: tuple[str, ...]
    features: tuple[FeatureConfig, ...]
    table_sizes: Mapping[str, int]
    splits: Mapping[str, Split]
    optimum: Mapping[str, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        for name in SPLITS:
            if name not in self.splits:
                raise ConfigError(f"dataset {self.name!r} has no {name!r} split")
        if len(self.splits["train"]) == 0:
            raise ConfigError(f"dataset {self.name!r} has no training rows")

    def fingerprint(self) -> str:
        """A checksum of every value, to tell whether a run continues on the data it began with."""
        checksum = 0
        for name in SPLITS:
            split = self.splits[name]
            for column in (split.dense_RxN, split.ids_RxK, split.label_R):
                checksum = zlib.crc32(np.ascontiguousarray(column).data, checksum)
        return f"{checksum:08x}"
