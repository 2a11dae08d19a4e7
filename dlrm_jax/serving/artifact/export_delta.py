"""Writing deltas (deltas.py), and folding them: a whole version of what a chain of them comes to."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError, LossConfig, ModelConfig, differences, require, tell, to_dict
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.serving.artifact.deltas import require_same_inputs
from dlrm_jax.serving.artifact.export import (
    MakeScore,
    by_the_program,
    described,
    make_signature,
    stored_facts,
    write_scores,
)
from dlrm_jax.serving.artifact.folded import folded
from dlrm_jax.serving.artifact.signature import Signature
from dlrm_jax.serving.artifact.signature import from_dict as signature_from_dict
from dlrm_jax.serving.artifact.spare import room_left, with_room
from dlrm_jax.serving.artifact.store import Version, write_version
from dlrm_jax.serving.artifact.vocabularies import read_columns, vocabulary_files
from dlrm_jax.serving.artifact.weights import CHANGED, MORE, ROWS, ArrayFile, Stored, ending, read_index, read_model
from dlrm_jax.serving.artifact.written import (
    Pieces,
    bits_of,
    flat,
    stored_as,
    stored_rows,
    vocabularies,
    write_header,
    write_json,
    write_rows,
)

_PIECE_BYTES = 1 << 26

RowsOf = Callable[[str, ArrayFile], Iterable[tuple[np.ndarray, np.ndarray]]]
"""(a table, or `<table>/pooling_weights`; its rows before) -> (row_M, rising, rows as they are to be stored) in pieces.

Every row that is not among them has the bits that it had.
"""


def differing(pieces: Pieces, kind: str) -> RowsOf:
    """Rows whose bits differ, of float32 rows of all a table: exactly these, whoever changed them."""

    def rows_of(name: str, before: ArrayFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first = 0
        for rows in stored_rows(name, pieces(name), stored_as(name, kind)):
            then = before.rows(first, first + len(rows))
            changed_M = np.flatnonzero((bits_of(rows).view(np.uint8) != bits_of(then).view(np.uint8)).any(axis=1))
            yield first + changed_M, rows[changed_M]
            first += len(rows)

    return rows_of


def export_delta(
    model_dir: pathlib.Path,
    parent: Version,
    model: ModelConfig,
    loss: LossConfig,
    dense_params: Any,
    rows_of: RowsOf,
    dataset: Dataset,
    facts: dict[str, Any] | None = None,
    evaluated: tuple[str, ...] = HELD_OUT,
    make_score: MakeScore = by_the_program,
    batch_stats: Mapping[str, Any] | None = None,
    new_words: bool = True,
) -> Version:
    """Write the next version as what is other than in `parent`, a version of `model_dir`, opened with all it changes.

    Without `new_words` vocabularies are known to be those of the parent. ConfigError where only a whole version can
    say what changed: another model, larger tables, other ids of values that there were.
    """
    before = signature_from_dict(parent.read_json("signature.json"))
    model, dense_params = folded(model, dense_params, batch_stats or {})
    signature = make_signature(model, dataset, before.kind)
    spare = room_left(model, read_model(parent)[0])
    grown = [name for name, rows in spare.items() if rows < 0]
    require(
        not grown,
        f"what is to change version {parent.number} has more rows in table {' '.join(grown[:1])!r} than there are, and "
        "the program that is served has fixed shapes; export a whole version, with --spare_rows for those to come",
    )
    signature = dataclasses.replace(signature, spare=spare or None)
    model = with_room(model, spare)
    different = differences(described(model, loss), parent.read_json("model.json"))
    where = f"what is to change version {parent.number}"
    require(not different, f"{where} is another model (now != there): {tell(different)}; export a whole version")
    require_same_inputs(signature, before, where)
    index, dense = read_index(parent), flat(dense_params)
    of_model = {name: stored for name, stored in index.items() if not stored.tables}
    require(of_model.keys() == dense.keys(), f"{where} has other weights; export a whole version")
    facts = stored_facts(signature, parent.manifest["table_bytes"]) | (facts or {})
    facts["parent"] = {"version": parent.number, "sha256": parent.sha256}

    def write(directory: pathlib.Path) -> None:
        for folder in ("weights", "tables"):
            (directory / folder).mkdir()
        for name, stored in of_model.items():
            write_rows(directory / stored.files[0], [dense[name]], dense[name].shape)
        facts["rows"] = sum(_write_changed(directory, parent, stored, rows_of) for stored in index.values())
        write_json(directory / "signature.json", to_dict(signature))
        if new_words and dataset.directory is not None and parent.has("vocabularies.json"):
            _write_more(directory, parent, signature, dataset.directory)
        version = Version(0, directory, {}, parent=parent)
        facts.update(write_scores(directory, make_score(version, model, loss, before.kind), loss, dataset, evaluated))

    return dataclasses.replace(write_version(model_dir, write, facts), parent=parent)


def _write_changed(directory: pathlib.Path, parent: Version, stored: Stored, rows_of: RowsOf) -> int:
    """The files of an array's tables; how many rows they have."""
    count = 0
    for table, file in zip(stored.tables, stored.files, strict=False):
        before = ArrayFile(parent, file, stored.dtype)
        path, numbers = directory / ending(file, CHANGED), [np.zeros(0, np.int32)]
        with path.open("wb") as output:
            write_header(output, (0, *before.shape[1:]), before.dtype)
            for row_M, rows in rows_of(table, before):
                numbers.append(row_M.astype(np.int32))
                np.ascontiguousarray(bits_of(rows)).tofile(output)
            row_M = np.concatenate(numbers)
            output.seek(0)
            write_header(output, (len(row_M), *before.shape[1:]), before.dtype)
        if len(row_M):
            np.save(directory / ending(file, ROWS), row_M, allow_pickle=False)
        else:
            path.unlink()
        count += len(row_M)
    return count


def _write_more(directory: pathlib.Path, parent: Version, signature: Signature, data_dir: pathlib.Path) -> None:
    """Keys behind those of the parent; ConfigError where those are others now."""
    (directory / "vocabularies").mkdir()
    files_of = vocabulary_files(parent)
    for table, columns in vocabularies(signature, data_dir):
        there = read_columns(parent, table, files_of[table])
        known = len(there[0])
        for file, now, then in zip(columns, columns.values(), there, strict=True):
            if not np.array_equal(now[:known], then):
                raise ConfigError(
                    f"ids of table {table!r} stand for other values than in version {parent.number}; export a whole "
                    "version"
                )
            if len(now) > known:
                np.save(directory / ending(file, MORE), now[known:], allow_pickle=False)


def fold(version: Version, model_dir: pathlib.Path) -> Version:
    """Write a version, with all that it changes, as the next version of `model_dir`: whole, as if exported directly."""
    require(
        version.directory.parent.resolve() != model_dir.resolve(),
        f"--out={model_dir} is where version {version.number} is; name another directory: who follows this one would "
        "go back to what is folded",
    )
    facts = {name: said for name, said in version.manifest.items() if name not in _OF_ONE}

    def write(directory: pathlib.Path) -> None:
        for name in version.chain[0].manifest["files"]:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(version.path(name), directory / name)
        for stored in read_index(version).values():
            for file in stored.files if stored.tables else ():
                array = ArrayFile(version, file, stored.dtype)
                write_rows(directory / file, _pieces(array), array.shape[:1])
        for table, files in vocabulary_files(version).items():
            for file, column in zip(files, read_columns(version, table, files), strict=True):
                np.save(directory / file, column, allow_pickle=False)
        version.require_unchanged()

    return write_version(model_dir, write, facts)


_OF_ONE = ("format_version", "version", "files", "parent", "rows", "updated")
"""What a manifest says of one version alone."""


def _pieces(array: ArrayFile) -> Iterator[np.ndarray]:
    step = max(1, _PIECE_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))
    for first in range(0, array.shape[0], step):
        yield array.rows(first, min(first + step, array.shape[0]))
