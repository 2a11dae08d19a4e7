"""Batches as packed rows: all columns of a row side by side, so that a row is one piece of memory.

Rows that are permuted go anywhere: one whose columns lie in four arrays goes to four places, and four arrays travel.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import struct

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.data.batch import Batch

PADDING = Batch(dense_BxN=0.0, ids_BxK=EMPTY_SLOT, label_B=0.0, weight_B=0.0)
"""What a batch's columns hold in rows that are there only to fill it."""
_LINE = 16
"""Words of a line of the cache."""


class PackedRows(struct.PyTreeNode):
    """Rows as `words` (..., W) int32: N dense, K ids, label, weight; floats are there by their bits.

    With N = 1 and K = 2 words 0 to 4 are: the number, the ids, the label, the weight. What follows them fills a line.
    """

    words: Any
    num_dense: int = struct.field(pytree_node=False)
    num_slots: int = struct.field(pytree_node=False)

    @property
    def batch(self) -> Batch:
        """The columns: of NumPy arrays views; of others, as in a jitted step, values."""
        words, label = self.words, self.num_dense + self.num_slots
        floats = (words[..., : self.num_dense], words[..., label], words[..., label + 1])
        dense, label_B, weight = (column.view(np.float32) for column in floats)
        ids = words[..., self.num_dense : label]
        return Batch(dense_BxN=dense, ids_BxK=ids, label_B=label_B, weight_B=weight)

    def __getitem__(self, rows: Any) -> "PackedRows":
        """Some of the leading axes."""
        return self.replace(words=self.words[rows])

    @property
    def padding(self) -> np.ndarray:
        """The (W,) words of a row that is padding."""
        row = self.replace(words=np.zeros(self.words.shape[-1], np.int32))
        row.batch.ids_BxK[:] = PADDING.ids_BxK
        return row.words

    def without_gaps(self) -> "PackedRows":
        """The same, for rows that stay, with nothing behind the weight."""
        return self.replace(words=np.ascontiguousarray(self.words[..., : self.num_dense + self.num_slots + 2]))


def row_words(num_dense: int, num_slots: int) -> int:
    """Words of a row that travels: whole lines, which are written fastest, where these are a quarter more at most."""
    words = num_dense + num_slots + 2
    whole = -(-words // _LINE) * _LINE
    return whole if 4 * (whole - words) <= words else words


def row_bytes(num_dense: int, num_slots: int, tiled: bool = False) -> int:
    """Bytes of a row that stays; as `tiled` on TPUs, where words lie by 8, or a few by 4."""
    words = num_dense + num_slots + 2
    tile = min(8, 1 << (words - 1).bit_length())
    return 4 * (-(-words // tile) * tile if tiled else words)


def empty(num_dense: int, num_slots: int, num_rows: int, allocate: Any = np.empty) -> PackedRows:
    """Rows that travel, in memory that `allocate(shape, dtype)` gives, which may hold anything."""
    return PackedRows(allocate((num_rows, row_words(num_dense, num_slots)), np.int32), num_dense, num_slots)


def taken(xp: Any, rows: PackedRows, order_B: Any) -> PackedRows:
    """Those of (R,) rows that `order_B` names, by `xp`, numpy or jax.numpy; padding, where it is R or more."""
    found_BxW = rows.words.take(order_B, axis=0, mode="clip")
    return rows.replace(words=xp.where((order_B < len(rows.words))[:, None], found_BxW, rows.padding))


def of_batch(batch: Batch, allocate: Any = np.empty) -> PackedRows:
    """A batch of NumPy arrays, of any leading axes, as packed rows that travel; `allocate` as for `empty`."""
    dense, ids = np.asarray(batch.dense_BxN), np.asarray(batch.ids_BxK)
    *leading, num_dense = dense.shape
    rows = empty(num_dense, ids.shape[-1], math.prod(leading), allocate)
    rows = rows.replace(words=rows.words.reshape(*leading, -1))

    def put(to: np.ndarray, column: np.ndarray) -> None:
        to[...] = column

    jax.tree.map(put, rows.batch, batch)
    return rows
