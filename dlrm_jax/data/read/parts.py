"""Rows in memory as they were read, in parts: put into windows one by one, never copied into one array before."""

import dataclasses
import functools
from typing import Any

import numpy as np

from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.native import address


@dataclasses.dataclass(frozen=True)
class Parts:
    """The rows of some splits, one after the other, with the columns of one; those are joined when they are asked for.

    `library` is native.py's.
    """

    parts: tuple[Split, ...]
    library: Any

    def __len__(self) -> int:
        return int(self._layout.firsts[-1])

    def put(self, rows_R: np.ndarray, to: tuple[np.ndarray, ...]) -> None:
        """Copy some rows into what is as long as `rows_R` of dense, ids, label and weight, each contiguous.

        Of a split without weights that of each row is 1.
        """
        layout, order_R = self._layout, np.ascontiguousarray(rows_R, np.int64)
        for name, column in zip(_BATCH, to, strict=True):
            if name not in layout.names:
                column[:] = 1
        places = np.array([address(to[_BATCH.index(name)]) for name in layout.names], np.uint64)
        self.library.dlrm_gather(
            *(address(layout.starts_PxC), address(layout.firsts), len(self.parts)),
            *(address(order_R), len(order_R), len(layout.names), address(layout.widths_C), address(places)),
        )

    @functools.cached_property
    def dense_RxN(self) -> np.ndarray:
        """See Split."""
        return np.concatenate([part.dense_RxN for part in self.parts])

    @functools.cached_property
    def ids_RxK(self) -> np.ndarray:
        """See Split."""
        return np.concatenate([part.ids_RxK for part in self.parts])

    @functools.cached_property
    def label_R(self) -> np.ndarray:
        """See Split."""
        return np.concatenate([part.label_R for part in self.parts])

    @functools.cached_property
    def row_R(self) -> np.ndarray:
        """See Split."""
        return np.concatenate([part.row_R for part in self.parts])

    @functools.cached_property
    def weight_R(self) -> np.ndarray | None:
        """See Split."""
        weights = [part.weight_R for part in self.parts if part.weight_R is not None]
        return np.concatenate(weights) if weights else None

    def joined(self) -> Split:
        """All rows as one split."""
        return Split(self.dense_RxN, self.ids_RxK, self.label_R, self.row_R, self.weight_R)

    @functools.cached_property
    def _layout(self) -> "_Layout":
        like = self.parts[0]
        names = tuple(name for name in _BATCH if (column := getattr(like, name)) is not None and column[:1].nbytes)
        columns_PxC = [[getattr(part, name) for name in names] for part in self.parts]
        return _Layout(
            names,
            np.array([[address(column) for column in of_part] for of_part in columns_PxC], np.uint64),
            np.cumsum([0, *map(len, self.parts)], dtype=np.int64),
            np.array([getattr(like, name)[:1].nbytes for name in names], np.int64),
        )


_BATCH = ("dense_RxN", "ids_RxK", "label_R", "weight_R")


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where columns are (`names`, of bytes a row): of part p from row `firsts[p]` of all on."""

    names: tuple[str, ...]
    starts_PxC: np.ndarray
    firsts: np.ndarray
    widths_C: np.ndarray
