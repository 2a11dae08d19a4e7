"""Tests `dlrm_jax/data/read/pipeline.py`."""

import threading
import time
from itertools import islice

import jax
import numpy as np
import pytest

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.pipeline import Prefetcher, steps_per_epoch
from tests.batches import eval_batches, train_batches

pytestmark = pytest.mark.timeout(300)  # A broken prefetcher waits for ever.


def numbered(rows: int) -> Split:
    """Row r holds r in every column."""
    r = np.arange(rows)
    return Split(r[:, None].astype(np.float32), r[:, None].astype(np.int32), r.astype(np.float32), r)


def real_rows(batches) -> list[int]:
    return [int(i) for batch in batches for i, w in zip(batch.ids_BxK[:, 0], batch.weight_B, strict=True) if w]


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 5), (10, 4), (10, 1), (1, 1), (3, 8)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_an_epoch_in_fixed_shapes(rows, batch_size, shuffle):
    per_epoch = steps_per_epoch(rows, batch_size)
    batches = list(islice(train_batches(numbered(rows), batch_size, 0, 0, shuffle), 2 * per_epoch))
    assert {batch.dense_BxN.shape for batch in batches} == {(batch_size, 1)}
    for epoch in range(2):
        assert sorted(real_rows(batches[epoch * per_epoch : (epoch + 1) * per_epoch])) == list(range(rows))


def test_padding_is_empty():
    batch = next(eval_batches(numbered(3), 8))
    assert (batch.ids_BxK[3:] == EMPTY_SLOT).all() and not batch.weight_B[3:].any() and not batch.dense_BxN[3:].any()


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7])
def test_starting_at_a_step_equals_skipping_to_it(start):
    from_zero = list(islice(train_batches(numbered(10), 3, 7, 0), start + 5))[start:]
    from_start = list(islice(train_batches(numbered(10), 3, 7, start), 5))
    jax.tree.map(np.testing.assert_array_equal, from_start, from_zero)


def test_order_follows_from_seed_and_epoch():
    starts = ((0, 0), (0, 5), (1, 0))
    epochs = [real_rows(islice(train_batches(numbered(50), 10, seed, start), 5)) for seed, start in starts]
    assert len({tuple(rows) for rows in epochs}) == 3
    assert real_rows(islice(train_batches(numbered(50), 10, 0, 0), 5)) == epochs[0]


def test_eval_keeps_order():
    assert real_rows(eval_batches(numbered(10), 4)) == list(range(10))
    assert list(eval_batches(numbered(0), 4)) == []


def test_prefetcher_gives_both_sides_of_each_batch_in_order():
    with Prefetcher(eval_batches(numbered(10), 4), jax.device_put) as batches:
        pairs = list(batches)
    assert real_rows(host for host, _ in pairs) == list(range(10))
    assert all(isinstance(device.ids_BxK, jax.Array) for _, device in pairs)


def test_prefetcher_raises_what_its_source_raises():
    def refuse(batch):
        if batch.label_B[0] == 4:
            raise ValueError("row 4")
        return batch

    with Prefetcher(map(refuse, eval_batches(numbered(10), 4)), jax.device_put) as batches:
        next(batches)
        for _ in range(2):
            with pytest.raises(ValueError, match="row 4"):
                next(batches)


def test_prefetcher_stays_ended():
    with Prefetcher(eval_batches(numbered(3), 4), jax.device_put) as batches:
        assert len(list(batches)) == 1
        assert list(batches) == []
    with Prefetcher(train_batches(numbered(3), 4, 0, 0), jax.device_put) as left_early:
        next(left_early)
    assert list(left_early) == []


def test_prefetcher_passes_on_an_exit_too():
    def leave(batch):
        raise SystemExit(3)

    with Prefetcher(map(leave, eval_batches(numbered(3), 4)), jax.device_put) as batches, pytest.raises(SystemExit):
        next(batches)


def test_prefetcher_ends_its_thread_when_left_early():
    with Prefetcher(train_batches(numbered(10), 4, 0, 0), jax.device_put) as batches:
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetcher_measures_waiting():
    def slow(batch):
        time.sleep(0.05)
        return batch

    with Prefetcher(map(slow, eval_batches(numbered(3), 1)), jax.device_put) as batches:
        list(batches)
    assert batches.wait_seconds > 0.1
