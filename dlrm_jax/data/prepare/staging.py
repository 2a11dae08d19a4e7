"""What is between the passes of a preparation: rows with provisional ids, on disk, in files that are whole or absent.

DIR/staging/job.json       what is being prepared, so that a restart goes on with the same and nothing else
DIR/staging/000007.rows    Arrow file of columns; its metadata say where in the log to go on
DIR/staging/000007.vocab   keys that these rows brought to the vocabularies, in the order of their ids
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.config import ConfigError, differences, tell
from dlrm_jax.host.files import whole

_VOCAB_SCHEMA = pa.schema([("key", pa.uint64()), ("check", pa.uint64()), ("text", pa.large_string())])
_META = b"dlrm_jax"
_LOG = logging.getLogger("dlrm_jax")


@dataclasses.dataclass
class Additions:
    """New keys of one table, in the order of their ids."""

    table: int
    keys: np.ndarray
    checks: np.ndarray | None
    texts: pa.Array | None


def wide_name(column: int) -> str:
    """Column name of a dense value that is kept as float64, because the whole log decides its transform."""
    return f"wide.{column}"


class Staging:
    """The staging folder of an output directory."""

    def __init__(self, output: pathlib.Path) -> None:
        self.directory = output / "staging"

    def begin(self, job: dict[str, Any]) -> None:
        """Create the folder, or go on in one that was left; ConfigError if that one is of another job.

        If the log itself has changed since, what was staged of it is of no use, and it begins anew.
        """
        path = self.directory / "job.json"
        if path.exists():
            then = json.loads(path.read_text())
            if then["on_bad_row"] == "error":
                then["on_bad_row"] = job["on_bad_row"]  # So far there was no bad row, so nothing to decide about.
            different = differences(job, then)
            changed = all(re.match(r"modified|inputs\[\d+\]\.bytes", line) for line in different)
            if different and self.num_files() and not changed:
                raise ConfigError(
                    f"{self.directory} holds an unfinished preparation of something else (now != then): "
                    f"{tell(different)}; delete it to start anew, or give the same input and settings"
                )
            if different:
                _LOG.info("%s: the log has changed since the last attempt; starting anew", self.directory)
                shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(job, indent=1).encode())

    def num_files(self) -> int:
        """Whole files so far: the first that is missing ends them."""
        count = 0
        while self._rows(count).exists():
            count += 1
        return count

    def _rows(self, index: int) -> pathlib.Path:
        return self.directory / f"{index:06d}.rows"

    def write(
        self,
        index: int,
        parts: list[dict[str, np.ndarray]],
        additions: Iterable[Additions],
        meta: dict[str, Any],
    ) -> None:
        """Write one file, a part a batch; the rows come last, so that they are there only if all is."""
        additions = list(additions)
        tables = {_META: json.dumps([(addition.table, len(addition.keys)) for addition in additions]).encode()}
        _write_arrow(
            self.directory / f"{index:06d}.vocab",
            _VOCAB_SCHEMA.with_metadata(tables),
            [_vocab_batch(addition) for addition in additions],
        )
        metadata = {_META: json.dumps(meta).encode()}
        batches = [pa.record_batch([_to_arrow(a) for a in part.values()], names=list(part)) for part in parts]
        _write_arrow(self._rows(index), batches[0].schema.with_metadata(metadata), batches)

    def meta(self, index: int) -> dict[str, Any]:
        """The metadata of a file."""
        with pa.OSFile(str(self._rows(index))) as file:
            return json.loads(pa.ipc.open_file(file).schema.metadata[_META])

    def batches(self, index: int, names: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
        """Some columns of a file, a batch after the other."""
        with pa.OSFile(str(self._rows(index))) as file:
            schema = pa.ipc.open_file(file).schema
            wanted = set(names)
            fields = [i for i, name in enumerate(schema.names) if name in wanted]
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i)
                yield {name: _to_numpy(batch.column(name)) for name in batch.schema.names}

    def times(self, num_files: int) -> Iterator[np.ndarray]:
        """The timestamps of some files, a batch after the other."""
        for index in range(num_files):
            for columns in self.batches(index, ["time"]):
                yield columns["time"]

    def num_keys(self, num_files: int) -> collections.Counter[int]:
        """How many keys each vocabulary, by its table's number, has after some files."""
        count: collections.Counter[int] = collections.Counter()
        for index in range(num_files):
            with pa.OSFile(str(self.directory / f"{index:06d}.vocab")) as file:
                for table, keys in json.loads(pa.ipc.open_file(file).schema.metadata[_META]):
                    count[table] += keys
        return count

    def additions(self, index: int, table: int | None = None) -> Iterator[Additions]:
        """What a file brought to the vocabularies, or to that of one table."""
        with pa.OSFile(str(self.directory / f"{index:06d}.vocab")) as file:
            reader = pa.ipc.open_file(file)
            for i, (of, _) in enumerate(json.loads(reader.schema.metadata[_META])):
                if table not in (None, of):
                    continue
                batch = reader.get_batch(i)
                checks = batch.column("check")
                texts = batch.column("text")
                yield Additions(
                    table=of,
                    keys=batch.column("key").to_numpy(),
                    checks=None if checks.null_count else checks.to_numpy(),
                    texts=None if texts.null_count else texts,
                )


def _to_arrow(array: np.ndarray) -> pa.Array:
    """A vector, or a matrix as lists of one length: rows stay together, as the blocks of the end have them."""
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).ravel()), array.shape[1])


def _to_numpy(array: pa.Array) -> np.ndarray:
    if not pa.types.is_fixed_size_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def _vocab_batch(addition: Additions) -> pa.RecordBatch:
    count = len(addition.keys)
    checks, texts = addition.checks, addition.texts
    return pa.record_batch(
        [
            pa.array(addition.keys),
            pa.nulls(count, pa.uint64()) if checks is None else pa.array(checks),
            pa.nulls(count, pa.large_string()) if texts is None else texts.cast(pa.large_string()),
        ],
        schema=_VOCAB_SCHEMA,
    )


def _write_arrow(path: pathlib.Path, schema: pa.Schema, batches: list[pa.RecordBatch]) -> None:
    with (
        writing(path),
        whole(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


class writing:
    """Context: what the disk refuses becomes a ConfigError that says where, and that nothing is lost."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        del kind, traceback
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())[:200]
            raise ConfigError(
                f"cannot write {self._path}: {reason}; what is finished is kept, run the same command to go on"
            ) from error


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Write a small file so that it is whole or absent."""
    with writing(path), whole(path) as temporary:
        temporary.write_bytes(data)
