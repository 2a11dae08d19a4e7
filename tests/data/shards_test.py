"""blocks.cc beside what it stands in for: array_record's reader, a plain loop, NumPy's permutation (`shards.py`)."""

import dataclasses
import itertools
import logging
import math
import types

import jax
import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.packed_rows import row_words
from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.read import native
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.pipeline import Cut, batch_windows
from dlrm_jax.data.read.prepared import PreparedSplit, open_prepared
from dlrm_jax.data.read.shards import Shards
from dlrm_jax.data.read.unread import Stretch, Target, Unread
from dlrm_jax.data.read.windows import concatenate, slice_rows
from dlrm_jax.host import native_code
from tests.prepared_helpers import csv_rows, in_small_blocks, prepare_text, schema

needs_compiler = pytest.mark.skipif(not native_code.has_compiler(), reason="no C++ compiler on this machine")
BORDER = 65_536 - 24
"""Bytes between two headers of a shard."""


class Bytes:
    """A column of bytes, as TFDS describes one."""

    np_dtype, shape = np.uint8, (None,)


def records(rng: np.random.Generator, sizes) -> list[bytes]:
    return [blocks.serialize({"bytes": rng.integers(0, 256, size, np.uint8)}) for size in sizes]


def shards_of(directory, kept: list[list[bytes]], compression: str = "none") -> Shards:
    paths = [directory / str(i) for i in range(len(kept))]
    for path, of_shard in zip(paths, kept, strict=True):
        blocks.write_shard(path, of_shard, compression)
    return Shards(paths, list(map(len, kept)), {"bytes": Bytes})


def plain(shards: Shards) -> list[int]:
    """Shards that blocks.cc reads."""
    return sorted(shard for shard, chunks in shards._chunks.items() if chunks is not None)


@needs_compiler
def test_records_are_those_of_array_record(tmp_path):
    """Whatever their size, wherever a header interrupts them, in any order and several at once."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, 31, 32, 33, BORDER - 150, *range(BORDER - 70, BORDER + 3, 9), 2 * BORDER, 700_000]
    kept = [records(rng, rng.permutation(sizes)), records(rng, [5]), records(rng, rng.integers(0, 99, 50))]
    shards, wanted = shards_of(tmp_path, kept), list(itertools.chain(*kept))
    library = native.library()
    assert list(map(bytes, shards.records(list(range(len(wanted)))))) == wanted
    for count in (1, 2, 3, len(wanted)):
        some = rng.permutation(len(wanted))[:count].tolist()
        assert list(map(bytes, shards.records(some, library))) == [wanted[i] for i in some]
    assert plain(shards) == [0, 1, 2] or not library.dlrm_reads()
    for index, block in enumerate(shards.blocks(list(range(len(wanted))), library)):
        np.testing.assert_array_equal(
            block["bytes"], blocks.parse(wanted[index], {"bytes": (np.dtype(np.uint8), ())})["bytes"]
        )


@needs_compiler
def test_compressed_shards_are_left_to_array_record(tmp_path):
    kept = [records(np.random.default_rng(0), [100, 70_000, 3])]
    shards = shards_of(tmp_path, kept, "zstd")
    assert list(shards.records([2, 0, 1], native.library())) == [kept[0][i] for i in (2, 0, 1)]
    assert not plain(shards)


def outcome(path, index: int, library) -> bytes | None:
    """A record of a shard of three; None where nobody reads it."""
    try:
        return bytes(next(Shards([path], [3], {"bytes": Bytes}).records([index], library)))
    except (IndexError, ValueError, RuntimeError):
        return None


@needs_compiler
def test_damage_is_found_where_array_record_finds_it(tmp_path):
    """A byte changed anywhere, headers included, and a file cut off: what array_record refuses is refused."""
    rng, library = np.random.default_rng(1), native.library()
    kept = [records(rng, [BORDER - 10, 40, 2 * BORDER + 5])]
    shards_of(tmp_path, kept)
    path, refused = tmp_path / "0", 0
    whole = path.read_bytes()
    headers = [*range(0, 140, 5), *range(65_536, 65_562, 2), *range(131_072, 131_100, 5)]
    for at in [*headers, *rng.integers(0, 200_000, 40).tolist(), *rng.integers(0, len(whole), 20).tolist()]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
        for index, wanted in enumerate(kept[0]):
            theirs, ours = outcome(path, index, None), outcome(path, index, library)
            assert ours == theirs and ours in (None, wanted), at
            refused += ours is None
    assert refused > 60
    path.write_bytes(whole[: len(whole) // 2])
    assert outcome(path, 0, library) is None


@needs_compiler
@pytest.mark.parametrize(("weighted", "off"), [(False, 0), (True, 0), (True, 4)])
@pytest.mark.parametrize(("num_dense", "num_slots"), [(13, 26), (0, 1), (1, 3), (5, 9), (7, 70), (100, 200)])
def test_rows_go_where_they_belong(num_dense, num_slots, weighted, off):
    """Parts of records, at any addresses, into several windows, some rows into none; each record read once.

    Rows of whole lines are written past the cache, where they lie so; what fills their lines is 0.
    """
    rng = np.random.default_rng(num_dense)

    def record(rows: int) -> Split:
        def column(*shape: int) -> np.ndarray:
            odd = np.frombuffer(rng.bytes(4 * rows * int(np.prod(shape)) + 1), np.uint8)
            return odd[1:].view(np.uint32).reshape(rows, *shape)

        return Split(column(num_dense), column(num_slots), column(), np.arange(rows), column() if weighted else None)

    kept = {index: record(rows) for index, rows in enumerate((900, 1, 17, 300))}
    pieces = [(0, 0, 100), (2, 5, 17), (1, 0, 1), (3, 0, 300), (0, 100, 850)]
    starts = np.cumsum([0] + [stop - start for _, start, stop in pieces])
    read = []

    def records(indices):
        read.extend(indices)
        return {index: kept[index] for index in indices}

    stretches = [Stretch(*piece, int(at), len(kept[piece[0]])) for piece, at in zip(pieces, starts, strict=False)]
    none, limits = slice_rows(kept[0], 0, 0), np.full(num_slots, 2**31, np.uint32)
    source = Unread(none, stretches, records, native.library(), Shards([], [], {}), limits)
    order, targets, wanted = rng.permutation(starts[-1])[:-50], [], []
    whole = concatenate([slice_rows(kept[index], start, stop) for index, start, stop in pieces])
    weight_R = np.ones(len(whole), np.float32) if whole.weight_R is None else whole.weight_R
    for rows_R, at in ((order[:400], 30), (order[400:401], 0), (order[401:], 7)):
        columns = [whole.dense_RxN, whole.ids_RxK, whole.label_R, weight_R]
        shape = len(rows_R) + 40, row_words(num_dense, num_slots)
        side_by_side = [column[rows_R].view(np.int32).reshape(len(rows_R), -1) for column in columns]
        filled, memory = np.zeros(shape, np.int32), np.zeros(4 * math.prod(shape) + 128, np.uint8)
        filled[at : at + len(rows_R), : num_dense + num_slots + 2] = np.concatenate(side_by_side, axis=1)
        wanted.append(filled)
        start = -native.address(memory) % 64 + off
        targets.append(Target(memory[start : start + filled.nbytes].view(np.int32).reshape(shape), rows_R, at))
    for job in source.jobs(targets):
        job()
    jax.tree.map(np.testing.assert_array_equal, [words for words, _, _ in targets], wanted)
    assert sorted(read) == [0, 1, 2, 3]


@needs_compiler
def test_a_record_of_another_layout_is_read_as_it_is(tmp_path, monkeypatch):
    """Columns in another order, in as many bytes; and one whose rows are not those that the dataset says."""
    in_small_blocks(monkeypatch)
    dtypes = {"dense": "float32", "ids": "int32", "label": "float32", "row": "int64"}
    shapes = {name: (None, 1) if name in ("dense", "ids") else (None,) for name in dtypes}
    kept = []
    for block in range(6):
        rows = np.arange(64 * block, 64 * block + 64)
        columns = {name: rows.astype(dtype).reshape(64, *shapes[name][1:]) for name, dtype in dtypes.items()}
        columns["label"] += 0.5
        order = ("dense", "ids", "label", "row") if block < 3 else ("label", "ids", "dense", "row")
        kept.append(b"".join(blocks.serialize({name: columns[name]}) for name in order))  # Messages that follow merge.
    assert len(set(map(len, kept))) == 1
    blocks.write_shard(tmp_path / "0", kept, "none")
    spec = {name: types.SimpleNamespace(np_dtype=dtype, shape=shapes[name]) for name, dtype in dtypes.items()}
    shards, ends = Shards([tmp_path / "0"], [6], spec), np.arange(64, 385, 64)
    split = PreparedSplit("train", shards, 384, np.array([384]), ends)
    filled, fill = [], Unread._filled
    monkeypatch.setattr(Unread, "_filled", lambda *args: [done := fill(*args), filled.extend(done)][0])
    for epoch in range(3):
        for window in batch_windows(iter([split.sources(0, epoch, True)]), Cut(50)):
            batch = window.batch
            real = batch.weight_B > 0
            for column in (batch.dense_BxN[..., 0], batch.label_B - 0.5):
                np.testing.assert_array_equal(column[real], batch.ids_BxK[..., 0][real])
    np.testing.assert_array_equal(split.whole().ids_RxK[:, 0], np.arange(384))
    assert filled, "C++ alone put some in their places"
    for first in (0, 3):
        short = dataclasses.replace(split, ends=np.arange(63, 379, 63), first=63 * first, num_rows=189)
        with pytest.raises(ConfigError, match=f"block {first} of split 'train' has 64 rows"):
            list(batch_windows(iter([short.sources(0, 0, False)]), Cut(50)))


@needs_compiler
def test_permutations_are_numpys():
    for count in (0, 1, 2, 3, 15, 16, 17, 18, 33, 1000, 65_536, 65_537, 131_072):
        for seed in range(3):
            wanted = np.random.default_rng((seed, count)).permutation(count)
            np.testing.assert_array_equal(native.permutation(native.library(), (seed, count), count), wanted)


@needs_compiler
def test_ids_outside_their_table_are_seen_wherever_they_are():
    library, rng = native.library(), np.random.default_rng(0)
    for rows, slots in ((1, 1), (1, 300), (7, 26), (4096, 26), (100, 3)):
        limits = rng.integers(1, 1000, slots)
        limits[rng.integers(slots)] = 2**31
        ids, limits_K = (rng.random((rows, slots)) * (limits + 1) - 1).astype(np.int32), limits.astype(np.uint32)

        def outside(ids=ids, limits_K=limits_K) -> bool:
            return bool(library.dlrm_any_outside(native.address(ids), *ids.shape, native.address(limits_K)))

        assert not outside()
        for value in (-2, -(2**31), 2**31 - 1):
            row, slot = rng.integers(rows), rng.integers(slots)
            kept, ids[row, slot] = ids[row, slot], value
            assert outside() == (not -1 <= value < limits[slot])
            ids[row, slot] = limits[slot] if limits[slot] < 2**31 else -2
            assert outside()
            ids[row, slot] = kept


@needs_compiler
def test_without_a_compiler_rows_are_the_same(tmp_path, monkeypatch, caplog):
    in_small_blocks(monkeypatch)
    output = prepare_text(tmp_path, csv_rows([(i % 2, i, f"v{i}") for i in range(1000)]), schema())
    split = open_prepared(output).splits["train"]
    ours = [window.row_R[order] for window, order in split.windows(0, 0, True)]
    assert all(type(source) is Unread for source, _ in split.sources(0, 0, True))
    monkeypatch.setattr(native, "library", native._made.__wrapped__)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "dlrm_jax"):
        theirs = [window.row_R[order] for window, order in split.windows(0, 0, True)]
    assert "rows are read slower than C++ would read them: no C++ compiler" in caplog.text
    assert all(type(source) is Split for source, _ in split.sources(0, 0, True))
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    with pytest.raises(ConfigError, match="ids outside their tables"):
        dataclasses.replace(split, limit_K=np.array([900])).whole()
