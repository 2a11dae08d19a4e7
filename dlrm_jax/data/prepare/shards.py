"""Writing the shards of a staged log's runs: blocks of its rows, finished, in files that are whole or absent."""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.prepare.runs import Part, Run
from dlrm_jax.data.prepare.splits import Splitter
from dlrm_jax.data.prepare.staging import Staging, write_whole

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Writes runs of a staged log. `finish` makes what a block holds of some rows of staged columns, `names`."""

    staging: Staging
    splitter: Splitter
    rows_FxP: np.ndarray
    """Rows of each part of the splitter in each staged file."""
    names: list[str]
    finish: Callable[[Columns, np.ndarray], Columns]
    compression: str

    def write(self, runs: list[tuple[Run, list[pathlib.Path]]], progress: Callable[[int], None]) -> list[Run]:
        """Write the shards that are missing, to the path of each; the runs with their checksums."""
        written, out = 0, []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [(run, list(self._submit(pool, run, paths))) for run, paths in runs]
            try:
                for run, of_run in futures:
                    shards = []
                    for (records, _), (rows, future) in zip(run.shards, of_run, strict=True):
                        shards.append((records, future.result()))
                        written += rows
                        progress(written)
                    out.append(dataclasses.replace(run, shards=tuple(shards)))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return out

    def _submit(
        self, pool: concurrent.futures.Executor, run: Run, paths: list[pathlib.Path]
    ) -> Iterator[tuple[int, concurrent.futures.Future[int]]]:
        """(rows, future checksum) of each shard."""
        ends, start = run.ends, 0
        for path, (records, _) in zip(paths, run.shards, strict=True):
            of_shard, ends = np.append(start, ends[:records]), ends[records:]
            start = int(of_shard[-1])
            yield start - int(of_shard[0]), pool.submit(self._write_shard, run, path, of_shard)

    def _write_shard(self, run: Run, path: pathlib.Path, borders: np.ndarray) -> int:
        """Write the run's records that begin and end at `borders`, rows of it; the checksum."""
        note = self.staging.directory / f"{path.name}.json"
        if path.exists() and note.exists():
            return int(json.loads(note.read_text())["checksum"])
        part = self.splitter.parts.index(Part(run.split, run.period))
        checksum = blocks.write_shard(path, self._records(part, borders.tolist()), self.compression)
        write_whole(note, json.dumps({"checksum": checksum}).encode())
        return checksum

    def _records(self, part: int, borders: list[int]) -> Iterator[bytes]:
        """Serialized blocks of the part's rows from each border to the next."""
        held: list[Columns] = []
        sizes = [stop - start for start, stop in itertools.pairwise(borders)]
        for piece in self._pieces(part, borders[0], borders[-1]):
            held.append(piece)
            while sizes and sum(len(columns["label"]) for columns in held) >= sizes[0]:
                block, size = {key: _joined([columns[key] for columns in held]) for key in piece}, sizes.pop(0)
                yield blocks.serialize({key: column[:size] for key, column in block.items()})
                held = [{key: column[size:] for key, column in block.items()}]

    def _pieces(self, part: int, start: int, stop: int) -> Iterator[Columns]:
        """The part's rows `start` to `stop`, finished, at most a block at once: so they stay in the cache."""
        first = 0
        for file, count in enumerate(self.rows_FxP[:, part]):
            if first + count > start and first < stop:
                position = first
                for i, columns in enumerate(self.staging.batches(file, self.names)):
                    codes = self.splitter.codes(file, i, columns)
                    mine = np.flatnonzero(np.broadcast_to(codes, columns["label"].shape) == part)
                    rows = mine[max(start - position, 0) : max(stop - position, 0)]
                    position += len(mine)
                    for piece in range(0, len(rows), blocks.BLOCK_ROWS):
                        yield self.finish(columns, rows[piece : piece + blocks.BLOCK_ROWS])
            first += int(count)


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
