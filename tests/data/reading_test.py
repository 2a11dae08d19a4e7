"""Tests reading prepared and generated rows (`prepared.py`, `windows.py`), and the batches made of them."""

import concurrent.futures
import contextlib
import dataclasses
import os
from itertools import islice

import jax
import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.generate import planted
from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.read import prepared as prepared_module
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.pipeline import (
    Cut,
    Prefetcher,
    batch_windows,
    order_windows,
    rows_and_labels,
    steps_per_epoch,
    train_epochs,
)
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.read.windows import GeneratedSplit
from tests.batches import eval_batches, plain_batches, plain_order, train_batches
from tests.prepared_helpers import csv_rows, in_small_blocks, prepare_text, schema

NUM_ROWS = 1003


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """1,003 rows in blocks of 64, windows of 3 blocks; row i holds i in every column."""
    with pytest.MonkeyPatch.context() as patch:
        in_small_blocks(patch, blocks_per_window=3)
        folder = tmp_path_factory.mktemp("prepared")
        output = prepare_text(folder, csv_rows([(i % 2, i, f"v{i}") for i in range(NUM_ROWS)]), schema())
        yield output, open_prepared(output).splits["train"]


def generated(rows: int = NUM_ROWS) -> GeneratedSplit:
    def make(index: int) -> Split:
        r = np.arange(index * 100, index * 100 + 100)
        return Split(r[:, None].astype(np.float32), r[:, None].astype(np.int32), (r % 2).astype(np.float32), r)

    return GeneratedSplit(0, rows, 100, make)


def numbers(batches) -> list[int]:
    return [int(x) for batch in batches for x, w in zip(batch.dense_BxN[:, 0], batch.weight_B, strict=True) if w]


@pytest.fixture(params=["prepared", "generated"])
def source(request, prepared):
    return prepared[1] if request.param == "prepared" else generated()


@pytest.mark.parametrize("batch_size", [1, 37, 64, 200, 1003, 2000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_an_epoch_and_in_whole_rows(source, batch_size, shuffle):
    per_epoch = steps_per_epoch(NUM_ROWS, batch_size)
    batches = list(islice(train_batches(source, batch_size, 5, 0, shuffle), 2 * per_epoch))
    for epoch in range(2):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {batch.dense_BxN.shape for batch in part} == {(batch_size, 1)}
        assert sorted(numbers(part)) == list(range(NUM_ROWS))
        for batch in part:
            real = batch.weight_B > 0
            np.testing.assert_array_equal(batch.ids_BxK[real, 0], batch.dense_BxN[real, 0])
            np.testing.assert_array_equal(batch.label_B[real], batch.dense_BxN[real, 0] % 2)
            assert (batch.ids_BxK[~real] == -1).all()


@pytest.mark.parametrize("start", [0, 1, 4, 5, 11, 13, 27, 28, 40])
def test_starting_at_a_step_equals_skipping_to_it(source, start):
    from_zero = numbers(islice(train_batches(source, 37, 7, 0), start + 6))[-6 * 37 :]
    from_start = numbers(islice(train_batches(source, 37, 7, start), 6))
    assert from_start == numbers(islice(train_batches(source, 37, 7, 0), start, start + 6))
    assert len(from_zero) == 6 * 37 or start > 20


def test_order_follows_from_seed_and_epoch_and_mixes_blocks(source):
    orders = [numbers(islice(train_batches(source, 59, seed, start), 17)) for seed, start in ((0, 0), (0, 17), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert numbers(islice(train_batches(source, 59, 0, 0), 17)) == orders[0]
    steps = np.abs(np.diff(orders[0]))
    assert (steps == 1).mean() < 0.1 and np.median(steps) > 10
    assert np.abs(np.mean(orders[0][:300]) - NUM_ROWS / 2) > 1, "an order by chance is not sorted"


def test_skipping_reads_nothing_before_the_position(prepared):
    _, split = prepared
    read = []

    class Recording:
        def __getattr__(self, name):
            return getattr(split.blocks, name)

        def blocks(self, indices, library):
            read.extend(indices)
            return split.blocks.blocks(indices, library)

        def chunks(self, indices, library):
            read.extend(indices)
            return split.blocks.chunks(indices, library)

    recording = dataclasses.replace(split, blocks=Recording())
    batches = list(batch_windows(iter([recording.sources(3, 0, True, 900)]), Cut(100)))
    assert len(batches) == 2
    visited = np.random.default_rng((3, 0)).permutation(16)
    assert set(read) == set(visited[4 * 3 :].tolist()), "rows 900 and on are in the windows from number 4 on"


def orders(split, seed, shuffle):
    shape = {} if isinstance(split, Split) else {"block_rows": split.order.block_rows}
    if shape:
        shape["blocks_per_window"] = split.order.blocks_per_window
    return lambda epoch: plain_order(len(split), seed, epoch, shuffle, **shape)


@pytest.mark.parametrize("kind", ["prepared", "generated", "memory"])
def test_windows_hold_the_batches_of_a_plain_loop_over_rows(prepared, kind):
    """Whatever the batch, the window, the process's share, the first step; and so do orders of rows that stay."""
    split = {"prepared": prepared[1], "generated": generated()}.get(kind) or generated().whole()
    whole, rng = split.whole(), np.random.default_rng(len(kind))
    for _ in range(25):
        batch_size, steps = int(rng.choice([1, 7, 64, 100, 1003, 1500])), int(rng.integers(1, 9))
        processes, devices = rng.integers(1, 4, 2)
        shard, multiple = (int(rng.integers(processes)), int(processes)), int(processes * devices)
        start, shuffle, seed = int(rng.integers(60)), bool(rng.integers(2)), int(rng.integers(99))
        wanted = list(plain_batches(whole, orders(split, seed, shuffle), batch_size, start, 5, shard, multiple))
        found = islice(train_batches(split, batch_size, seed, start, shuffle, shard, multiple, steps), 5)
        jax.tree.map(np.testing.assert_array_equal, list(found), wanted)
        cut = Cut(batch_size, steps, multiple, shard)
        epochs = train_epochs(split, batch_size, seed, start, shuffle, "positions")
        rows = np.concatenate(list(islice(order_windows(epochs, cut, len(split)), -(-5 // steps))))[:5]
        numbers = np.append(whole.row_R, -1)[rows]
        for order_B, batch in zip(numbers, wanted, strict=True):
            np.testing.assert_array_equal(order_B, np.where(batch.weight_B > 0, batch.dense_BxN[:, 0], -1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_processes_share_one_global_order(source, count):
    """Side by side their parts are the batches of one process, padding included."""
    whole = list(islice(train_batches(source, 40, 2, 20), 8))
    parts = [list(islice(train_batches(source, 40, 2, 20, shard=(i, count)), 8)) for i in range(count)]
    for step, batch in enumerate(whole):
        for field in ("dense_BxN", "ids_BxK", "label_B", "weight_B"):
            together = np.concatenate([getattr(part[step], field) for part in parts])
            np.testing.assert_array_equal(together, getattr(batch, field))


def test_eval_keeps_order_and_rows(source):
    assert numbers(eval_batches(source, 100)) == list(range(NUM_ROWS))
    row_R, label_R = rows_and_labels(source)
    np.testing.assert_array_equal(row_R, np.arange(NUM_ROWS))
    np.testing.assert_array_equal(label_R, row_R % 2)


def test_reader_threads_end_with_their_iterator(source):
    import threading

    with Prefetcher(train_batches(source, 10, 0, 0), lambda batch: batch) as batches:
        next(batches)
    del batches
    import gc

    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read", "prefetch"))]


def test_a_damaged_block_is_named(prepared, tmp_path):
    import shutil

    output, _ = prepared
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    shard = next(copy.glob("log-train*"))
    data = bytearray(shard.read_bytes())
    middle = data.find(np.arange(300, 320, dtype=np.float32).tobytes())
    assert middle > 0
    data[middle : middle + 40] = b"\xff" * 40
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match=r"block \d+ of split 'train' cannot be read: .*prepare it anew"):
        numbers(eval_batches(open_prepared(copy).splits["train"], 100))
    shard.unlink()
    with pytest.raises(ConfigError, match="is missing; prepare the dataset anew"):
        open_prepared(copy)
    (copy / "statistics.json").write_text("{")
    with pytest.raises(ConfigError, match=r"statistics\.json was changed"):
        open_prepared(copy)


def test_ids_outside_their_table_are_seen_when_read(prepared):
    _, split = prepared
    rng = np.random.default_rng(0)
    for shape in ((1, 3), (100, 3), (192, 1), (4096, 5)):
        ids = rng.integers(-1, 10**6, shape).astype(np.int32)
        np.testing.assert_array_equal(prepared_module._largest(ids), ids.max(axis=0))
    small = dataclasses.replace(split, limit_K=np.array([900]))
    with pytest.raises(ConfigError, match="ids outside their tables"):
        numbers(eval_batches(small, 100))


def test_planted_log_is_the_same_in_memory_and_made_as_it_is_read(monkeypatch):
    in_memory = planted.generate(3, 150_000)
    monkeypatch.setattr(planted, "_MAX_IN_MEMORY", 1000)
    streamed = planted.generate(3, 150_000)
    for name in ("train", "val", "test"):
        ours = np.concatenate([batch.ids_BxK for batch in eval_batches(streamed.splits[name], 5_000)])
        np.testing.assert_array_equal(ours, in_memory.splits[name].ids_RxK)
    assert streamed.fingerprint() != planted.generate(4, 150_000).fingerprint()


@pytest.mark.parametrize("rows", [0, 1, 100])
def test_records_are_those_of_tfds_own_serializer(rows):
    import tensorflow_datasets as tfds

    spec = blocks.features(3, 5, weighted=True)
    rng = np.random.default_rng(0)
    block = {
        "dense": rng.normal(size=(rows, 3)).astype(np.float32),
        "ids": rng.integers(0, 9, (rows, 10)).astype(np.int32)[:, ::2],
        "label": np.ones(rows, np.float32),
        "weight": np.ones(rows, np.float32),
        "row": np.arange(rows),
    }
    example = tfds.core.example_serializer.ExampleSerializer(spec.get_serialized_info())
    theirs = example.get_tf_example(spec.encode_example(block)).SerializeToString(deterministic=True)
    assert blocks.serialize(block) == theirs
    columns = {name: (np.dtype(column.np_dtype), column.shape[1:]) for name, column in spec.items()}
    ours = blocks.parse(theirs, columns)
    for name, column in spec.deserialize_example_np(theirs).items():
        np.testing.assert_array_equal(column, block[name])
        np.testing.assert_array_equal(ours[name], block[name])
    with pytest.raises(ValueError, match="it has the columns"):
        blocks.parse(theirs, columns | {"more": columns["label"]})
    for length in range(len(theirs) - 1, 0, -max(1, len(theirs) // 50)):
        with pytest.raises(ValueError):
            blocks.parse(theirs[:length], columns)


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    """A dataset of a thousand shards is read where a process may have fewer files open."""
    monkeypatch.setattr("dlrm_jax.data.prepare.runs.BLOCKS_PER_SHARD", 1)
    for module in ("prepare.blocks", "read.prepared"):
        monkeypatch.setattr(f"dlrm_jax.data.{module}.BLOCK_ROWS", 10)
    monkeypatch.setattr("dlrm_jax.data.read.shards.OPEN_SHARDS", 4)
    output = prepare_text(tmp_path, csv_rows([(i % 2, i, f"v{i}") for i in range(600)]), schema())
    source = open_prepared(output).splits["train"]
    before, most = open_shards(output), 0
    for _ in range(2):
        for block in range(60):
            assert source.read(np.array([block])).dense_RxN[0, 0] == block * 10
            most = max(most, open_shards(output) - before)
    assert len(list(output.glob("*.array_record-*"))) >= 60 and 1 <= most <= 4
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for block, found in enumerate(pool.map(lambda i: source.read(np.array([i % 60])).dense_RxN[0, 0], range(240))):
            assert found == block % 60 * 10
    assert open_shards(output) <= 4


def open_shards(output) -> int:
    """How many shards this process has open, some of them maybe more than once."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith(f"{output}/")
    return found
