"""Preparation from Python: files or a table in memory to a dataset, and what is in it."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.api.frames import as_log, as_numpy, as_polars, is_table
from dlrm_jax.config import ConfigError, require, require_choice
from dlrm_jax.data.formats.source import expand
from dlrm_jax.data.infer.choose import choose_schema
from dlrm_jax.data.infer.layout import guess_name
from dlrm_jax.data.prepare import preparation
from dlrm_jax.data.prepare.bar import Bar
from dlrm_jax.data.prepare.extend import open_past
from dlrm_jax.data.prepare.preparation import Options
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.prepared import is_prepared, open_prepared, read_json, read_schema
from dlrm_jax.data.schema import schema_io
from dlrm_jax.data.schema.schema import SPLITS, Schema
from dlrm_jax.data.values.label_values import one_class_warnings, shown_texts
from dlrm_jax.host import files
from dlrm_jax.host.heap import keep_freed_chunks

_LOG = logging.getLogger("dlrm_jax")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared dataset: its `directory`, as `train` takes it too, and what was counted on the way.

    `new_rows` were prepared by the call that gave it, in `seconds`.
    """

    directory: pathlib.Path
    new_rows: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", pathlib.Path(self.directory))
        require(
            is_prepared(self.directory),
            f"{self.directory} is no prepared dataset (python -m dlrm_jax.prepare makes one)",
        )

    def __fspath__(self) -> str:
        return str(self.directory)

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:
        """What `statistics.json` says: rows of splits and tables, what was skipped, and why."""
        found: dict[str, Any] = read_json(self.directory / "statistics.json")
        return found

    @functools.cached_property
    def schema(self) -> Schema:
        """What the columns are, with the reasons where it was inferred (`schema.reasons`)."""
        return read_schema(self.directory)

    @property
    def splits(self) -> dict[str, int]:
        """Rows of train, val and test."""
        return {name: split["rows"] for name, split in self.statistics["splits"].items()}

    @property
    def tables(self) -> dict[str, int]:
        """Rows of each embedding table, one for each id that its columns may have."""
        return {name: table["rows"] for name, table in self.statistics["tables"].items()}

    def __len__(self) -> int:
        return sum(self.splits.values())

    def to_arrow(self, split: str = "train") -> pa.Table:
        """A split as the model gets it: `row` in the log, label, weight, numbers (float32), ids (int32; bags as lists).

        An id names a row of its table, an empty slot is null. ConfigError for a split that there is not.
        """
        require_choice("split", split, SPLITS)
        dataset = self.open()
        rows = dataset.splits[split].whole()
        columns: dict[str, Any] = {"row": rows.row_R, self.schema.label.column: rows.label_R}
        if rows.weight_R is not None:
            columns[self.schema.weight] = rows.weight_R
        columns |= dict(zip(dataset.dense_names, rows.dense_RxN.T, strict=False))
        start = 0
        for feature in dataset.features:
            columns[feature.name] = _ids(rows.ids_RxK[:, start : start + feature.hotness])
            start += feature.hotness
        return pa.table(
            {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
        )

    def to_pandas(self, split: str = "train") -> Any:
        """`to_arrow` as a pandas DataFrame."""
        return self.to_arrow(split).to_pandas()

    def to_polars(self, split: str = "train") -> Any:
        """`to_arrow` as a polars DataFrame."""
        return as_polars(self.to_arrow(split))

    def to_numpy(self, split: str = "train") -> dict[str, np.ndarray]:
        """`to_arrow` as NumPy arrays by column name."""
        return as_numpy(self.to_arrow(split))

    def open(self) -> Dataset:
        """The rows as training reads them."""
        return open_prepared(self.directory)

    def describe(self) -> str:
        """The statistics as a table; pictures of them are drawn in the directory, which is named at its end."""
        from dlrm_jax.data.prepare.describe import describe  # Draws pictures, which takes a second to import.

        return describe(self.directory)

    def warnings(self) -> list[str]:
        """What a person should look at: a line for each split whose rows all have one label."""
        return one_class_warnings(self.statistics["splits"])

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        skipped = self.statistics["skipped"]
        if skipped["rows"]:
            yield f"skipped {skipped['rows']:,} rows:"
            for reason, count in sorted(skipped["reasons"].items(), key=lambda item: -item[1])[:20]:
                yield f"  {count:,}  {reason}"
            yield f"  the first: {skipped['examples'][0]}"
        for name, feature in self.statistics["features"].items():
            if feature["truncated_ids"]:
                yield f"{name}: {feature['truncated_ids']:,} ids beyond hotness {feature['hotness']} were left out"
        negative = self.statistics.get("negative_texts")
        if negative:
            yield f"label: counted as negative: {shown_texts(negative)}"
        for note in self.statistics.get("notes", ()):
            yield f"note: {note}"
        parts = ", ".join(f"{name} {rows:,}" for name, rows in self.splits.items())
        new = f" of which {self.new_rows:,} are new" if self.new_rows not in (0, len(self)) else ""
        tables = f"{len(self.tables)} tables of {sum(self.tables.values()):,} rows in all"
        yield f"{len(self):,} rows ({parts}){new}, {tables}"


def _ids(ids_Rxh: np.ndarray) -> pa.Array:
    """The ids of a feature: one a row, or a list."""
    there_Rxh = ids_Rxh >= 0
    if ids_Rxh.shape[1] == 1:
        return pa.array(ids_Rxh[:, 0], mask=~there_Rxh[:, 0])
    ends = np.concatenate([[0], there_Rxh.sum(axis=1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(ids_Rxh[there_Rxh]))


def prepare(
    input: Any,
    output: str | os.PathLike[str],
    schema: str | os.PathLike[str] | Mapping[str, Any] | Schema = "infer",
    *,
    on_bad_row: str = "error",
    max_memory: int | str = 0,
    compression: str = "none",
    extend: str | os.PathLike[str] | None = None,
    refit: bool = False,
    progress: bool = True,
) -> Prepared:
    """Prepare a click log for training: every value gets an id or a number, every row a split.

    `input` is a table in memory (a DataFrame of pandas or polars, a pyarrow Table, names with NumPy arrays), a file, a
    glob, or a list of them. `schema` says what the columns are: `infer` guesses, and gives its reasons; a YAML or JSON
    file, a preset's name, a dictionary as such a file has it, or a Schema. The same call goes on where one was stopped,
    and is done at once where one was finished; the dataset lies in `output`, a new or empty directory.

    `on_bad_row` is error or skip_and_count; `max_memory` bytes, or as "4GB"; `compression` none or zstd; `extend` a
    finished dataset, whose rows and ids are kept, before these; with `refit` transforms are fitted to all days.

    >>> import dlrm_jax
    >>> log = {"click": [0, 1, 0, 1] * 50, "price": list(range(200)), "user": [f"u{i % 7}" for i in range(200)]}
    >>> prepared = dlrm_jax.prepare(log, "data/clicks", progress=False)
    >>> len(prepared), prepared.tables["user"] >= 7, prepared.schema.label.column
    (200, True, 'click')

    Raises ConfigError, in one line, for what the caller can mend: a bad row, a column that is missing, a full disk.
    """
    directory = pathlib.Path(output)
    files.require_output_directory("output", directory)
    past_directory = None if extend is None else pathlib.Path(extend)
    options = Options(on_bad_row, parse_bytes(max_memory), compression, past_directory, refit)
    with _paths(input, directory) as paths:
        past = open_past(past_directory, directory) if past_directory else None
        known = past.schema if past and schema == "infer" else _schema(schema, paths)
        if schema == "infer" and not past and is_table(input):  # Which has no file that it could be named after.
            known = dataclasses.replace(known, name=guess_name(str(directory)))
        for reason in () if past else known.reasons:
            _LOG.info("schema: %s", reason)
        keep_freed_chunks()
        start = time.perf_counter()
        with Bar() if progress else contextlib.nullcontext() as bar:
            preparation.prepare(paths, directory, known, options, *([bar.show] if bar else []))
    made = Prepared(directory)
    seconds = time.perf_counter() - start
    return dataclasses.replace(made, new_rows=len(made) - (past.rows if past else 0), seconds=seconds)


@contextlib.contextmanager
def _paths(given: Any, output: pathlib.Path) -> Iterator[tuple[str, ...]]:
    """The log's files, for the length of the block."""
    if is_table(given):
        with as_log(given, output) as paths:
            yield paths
    elif isinstance(given, str | os.PathLike):
        yield expand(os.fspath(given))
    else:
        named = isinstance(given, Sequence) and bool(given) and all(isinstance(one, str | os.PathLike) for one in given)
        require(named, f"input is {type(given).__name__}; give a table in memory, a file, or a list of files")
        yield tuple(dict.fromkeys(path for one in given for path in expand(os.fspath(one))))


def _schema(given: Any, paths: tuple[str, ...]) -> Schema:
    if isinstance(given, Schema):
        return given
    if isinstance(given, Mapping):
        return schema_io.from_dict(dict(given), "schema")
    return choose_schema(os.fspath(given), paths)


def parse_bytes(given: int | str) -> int:
    """Bytes: a number of them, or `4GB`, `512M`; 0 for nothing."""
    upper = str(given).strip().upper().removesuffix("B").removesuffix("I")
    unit = upper[-1:] if upper[-1:].isalpha() else ""
    try:
        value = float(upper.removesuffix(unit) or "0") * _UNITS[unit]
    except (KeyError, ValueError):
        value = -1.0
    if not 0 <= value < 2**63:
        raise ConfigError(f"--max_memory={given} is no amount of memory, as 4GB or 512MB")
    return int(value)
