"""Batches one by one: as the package's windows hold them, and as a plain loop over rows makes them (the oracle)."""

import itertools

import numpy as np

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.pipeline import Cut, batch_windows, steps_per_epoch, train_epochs


def train_batches(split, batch_size, seed, start_step, shuffle=True, shard=(0, 1), multiple=1, steps=3):
    """The batches from number `start_step` on, for ever, out of windows of `steps`."""
    epochs = train_epochs(split, batch_size, seed, start_step, shuffle)
    for window in batch_windows(epochs, Cut(batch_size, steps, multiple, shard)):
        yield from (window[i].batch for i in range(steps))


def eval_batches(split, batch_size, steps=3):
    """Every row once, in order."""
    windows = batch_windows(iter([split.sources(0, 0, shuffle=False)]), Cut(batch_size, steps))
    batches = (window[i].batch for window in windows for i in range(steps))
    return itertools.islice(batches, steps_per_epoch(len(split), batch_size))


def plain_order(num_rows, seed, epoch, shuffle, block_rows=None, blocks_per_window=1):
    """An epoch's rows: all permuted, or those of a few blocks at a time, the blocks in an order of their own."""
    if block_rows is None:
        return list(np.random.default_rng((seed, epoch)).permutation(num_rows)) if shuffle else list(range(num_rows))
    blocks = [list(range(i, min(i + block_rows, num_rows))) for i in range(0, num_rows, block_rows)]
    if shuffle:
        blocks = [blocks[b] for b in np.random.default_rng((seed, epoch)).permutation(len(blocks))]
    order = []
    for window, first in enumerate(range(0, len(blocks), blocks_per_window)):
        rows = [row for block in blocks[first : first + blocks_per_window] for row in block]
        if shuffle:
            rows = [rows[i] for i in np.random.default_rng((seed, epoch, window)).permutation(len(rows))]
        order += rows
    return order


def plain_batches(whole, order_of, batch_size, start_step, count, shard=(0, 1), multiple=1):
    """`count` batches from step `start_step` on; `order_of(epoch)` gives the epoch's rows of `whole`."""
    per_epoch = steps_per_epoch(len(whole), batch_size)
    size = -(-batch_size // multiple) * multiple
    mine = slice(size // shard[1] * shard[0], size // shard[1] * (shard[0] + 1))
    for step in range(start_step, start_step + count):
        epoch, position = divmod(step, per_epoch)
        rows = order_of(epoch)[position * batch_size : (position + 1) * batch_size]
        rows = ([*rows, *[None] * (size - len(rows))])[mine]

        def column(values, padding, rows=rows):
            filler = np.full(values.shape[1:], padding, values.dtype)
            return np.array([filler if row is None else values[row] for row in rows])

        weights = np.ones(len(whole), np.float32) if whole.weight_R is None else whole.weight_R
        yield Batch(
            dense_BxN=column(whole.dense_RxN, 0),
            ids_BxK=column(whole.ids_RxK, EMPTY_SLOT),
            label_B=column(whole.label_R, 0),
            weight_B=column(weights, 0),
        )
