"""Batches as packed rows: all columns of a row side by side, so that a row is one piece of memory.

Rows that are permuted lie anywhere: one in four columns is four places to go to, and four arrays that travel.
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


class PackedRows(struct.PyTreeNode):
    """Rows as `words` (..., W) int32, W = N + K + 2: dense, ids, label, weight; floats are there by their bits.

    With N = 1 number and K = 2 ids, words 0 to 4 are: the number, the ids, the label, the weight.
    """

    words: Any
    num_dense: int = struct.field(pytree_node=False)

    @property
    def batch(self) -> Batch:
        """The columns: of NumPy arrays views; of others, as in a jitted step, values."""
        words, ids = self.words, slice(self.num_dense, -2)
        floats = (words[..., : self.num_dense], words[..., -2], words[..., -1])
        dense, label, weight = (column.view(np.float32) for column in floats)
        return Batch(dense_BxN=dense, ids_BxK=words[..., ids], label_B=label, weight_B=weight)

    def __getitem__(self, rows: Any) -> "PackedRows":
        """Some of the leading axes."""
        return self.replace(words=self.words[rows])


def row_bytes(num_dense: int, num_slots: int, tiled: bool = False) -> int:
    """Bytes of a row; as `tiled` on TPUs, where words lie by 8, or a few by 4."""
    words = num_dense + num_slots + 2
    tile = min(8, 1 << (words - 1).bit_length())
    return 4 * (-(-words // tile) * tile if tiled else words)


def empty(num_dense: int, num_slots: int, num_rows: int, allocate: Any = np.empty, padded: bool = True) -> PackedRows:
    """Rows in memory that `allocate(shape, dtype)` gives: padding, or anything unless `padded`."""
    rows = PackedRows(allocate((num_rows, num_dense + num_slots + 2), np.int32), num_dense)
    if padded:
        rows.words[:] = padding(num_dense, num_slots)
    return rows


def padding(num_dense: int, num_slots: int) -> np.ndarray:
    """The (W,) words of a row of padding."""
    row = PackedRows(np.zeros(num_dense + num_slots + 2, np.int32), num_dense)
    row.batch.ids_BxK[:] = PADDING.ids_BxK
    return row.words


def taken(xp: Any, rows: PackedRows, order_B: Any) -> PackedRows:
    """Those of (R,) rows that `order_B` names, by `xp`, numpy or jax.numpy; where it is R or more padding."""
    found_BxW = rows.words.take(order_B, axis=0, mode="clip")
    filler_W = padding(rows.num_dense, found_BxW.shape[1] - rows.num_dense - 2)
    return rows.replace(words=xp.where((order_B < len(rows.words))[:, None], found_BxW, filler_W))


def packed(batch: Batch) -> PackedRows:
    """A batch of NumPy arrays, of any leading axes, as packed rows."""
    dense, ids = np.asarray(batch.dense_BxN), np.asarray(batch.ids_BxK)
    *leading, num_dense = dense.shape
    rows = empty(num_dense, ids.shape[-1], math.prod(leading), padded=False)
    rows = rows.replace(words=rows.words.reshape(*leading, -1))

    def put(to: np.ndarray, column: np.ndarray) -> None:
        to[...] = column

    jax.tree.map(put, rows.batch, batch)
    return rows
