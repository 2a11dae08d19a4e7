"""Schema: what the columns of a log mean. From a file (schema_io.py), a preset (presets.py), or guessed (infer.py)."""

import dataclasses
import math

from dlrm_jax.config import FeatureConfig, require, require_choice, require_unique
from dlrm_jax.data.formats.encoding import UTF8, require_encoding
from dlrm_jax.data.formats.readers import READERS
from dlrm_jax.data.schema.sparse import Sparse, check_crosses
from dlrm_jax.data.values import transforms
from dlrm_jax.data.values.periods import require_period

MOVIELENS = ("movielens", "movielens_by_time")
FORMATS = ("text", "parquet", "jsonl", "dlrm_npz", "mlperf_bin", "torchrec_npy", "mlperf_multi_hot", *MOVIELENS)
DENSE_MISSING = ("fill", "mean", "error")
MAX_NAME_BYTES = 100
"""Of a dataset's name, with which its files' names begin."""
SPLITS = ("train", "val", "test")
HELD_OUT = SPLITS[1:]
"""Rows that are scored and not learned from."""
SPLITS_BY = ("order", "random", "time", "column", "files", "last_part")


@dataclasses.dataclass(frozen=True)
class Label:
    """The 0/1 target: as it stands, or 1 where the text is among `positive`, or where the number is >= `threshold`."""

    column: str
    positive: tuple[str, ...] = ()
    threshold: float | None = None

    def __post_init__(self) -> None:
        require(not (self.positive and self.threshold is not None), "label: give positive or threshold, not both")


@dataclasses.dataclass(frozen=True)
class Dense:
    """A number. Transforms, x being the number (values/transforms.py has the registry):

    none; log1p: log(max(x, 0) + 1), as the reference; nvidia_log: log(x + 3), as DeepLearningExamples, where missing is
    -2 (say fill: -2); torchrec_log: log(x - m + 2), m the least value of all torchrec_log columns (TorchRec takes it
    per file, so that its files differ); standardise: (x - mean) / standard deviation of all rows.
    `missing`: fill with the number `fill` before the transform, fill with the column's mean, or an error.
    `embed`: the number meets the features as a vector of its own too (model/vectors.py).
    """

    name: str
    column: str = ""
    transform: str = "none"
    missing: str = "fill"
    fill: float = 0.0
    embed: bool = False

    def __post_init__(self) -> None:
        require_choice(f"dense column {self.name!r}: transform", self.transform, transforms.names())
        require_choice(f"dense column {self.name!r}: missing", self.missing, DENSE_MISSING)
        require(math.isfinite(self.fill), f"dense column {self.name!r}: fill is {self.fill}; it must be finite")
        require(
            self.missing != "mean" or self.transform not in ("torchrec_log", "nvidia_log"),
            f"dense column {self.name!r}: missing: mean does not go with transform: {self.transform}",
        )

    @property
    def source(self) -> str:
        """The column of the log."""
        return self.column or self.name

    @property
    def needs_statistics(self) -> bool:
        """Whether its values depend on the whole log."""
        return self.transform in ("torchrec_log", "standardise") or self.missing == "mean"


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows are train, val and test.

    order: the first rows train, the last test; random: by a hash of the row's position; time: by the timestamp, ties
    in train, and with a `period`, as 1d (values/periods.py), by whole periods: `val` and `test` count the last ones
    that have rows, one each where a file leaves them out; column: `column` says train, val or test; files: those that
    match `val_files` and `test_files`; last_part: the log in `parts` equal parts (0: its files), the last halved,
    `first_half` saying what the first half is (the reference: test; MLPerf and TorchRec: val).
    """

    by: str = "random"
    val: float = 0.1
    test: float = 0.1
    seed: int = 0
    column: str = ""
    val_files: str = ""
    test_files: str = ""
    parts: int = 0
    first_half: str = "val"
    period: str = ""

    def __post_init__(self) -> None:
        require_choice("split: by", self.by, SPLITS_BY)
        require_choice("split: first_half", self.first_half, HELD_OUT)
        if self.period:
            self._check_period()
        else:
            require(
                self.val >= 0 and self.test >= 0 and self.val + self.test < 1,
                f"split: val is {self.val} and test {self.test}; they are fractions that leave something for train",
            )
        require(self.parts >= 0, f"split: parts is {self.parts}; it must not be negative")
        require(self.by != "column" or bool(self.column), "split: by: column needs column")
        require(self.by != "files" or bool(self.val_files or self.test_files), "split: by: files needs test_files")

    def _check_period(self) -> None:
        require(self.by == "time", f"split: period is {self.period!r}, but by is {self.by}; a period needs by: time")
        require_period(self.period)
        for name in HELD_OUT:
            value = getattr(self, name)
            whole = value >= 0 and value % 1 == 0
            require(whole, f"split: {name} is {value}; beside a period it is a whole number of periods, as 1")
            object.__setattr__(self, name, int(value))


@dataclasses.dataclass(frozen=True)
class Schema:
    """A whole log. `columns` names those of a file without header; `null_values` are texts that mean missing.

    `encoding` is that of delimited text and JSON lines; `decimal` is what stands before a fraction in the texts of
    numbers, a point or a comma.
    """

    name: str
    label: Label
    dense: tuple[Dense, ...] = ()
    sparse: tuple[Sparse, ...] = ()
    weight: str = ""
    timestamp: str = ""
    split: Split = Split()
    format: str = ""
    delimiter: str = ""
    header: bool = True
    columns: tuple[str, ...] = ()
    quote: str = '"'
    null_values: tuple[str, ...] = ("",)
    encoding: str = UTF8
    decimal: str = "."
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.name.isidentifier() and self.name.islower(), f"schema name {self.name!r} is not a lower_case name")
        require(
            len(self.name.encode()) <= MAX_NAME_BYTES,
            f"schema name {self.name!r} is longer than {MAX_NAME_BYTES} bytes; files are named after it",
        )
        if self.format:
            require_choice("schema: format", self.format, (*FORMATS, *READERS.all()))
        require(len(self.delimiter) <= 1, f"schema: delimiter is {self.delimiter!r}; one character")
        require_encoding(self.encoding)
        require(self.decimal in (".", ","), f'schema: decimal is {self.decimal!r}; write "." or ","')
        require(len(self.quote) <= 1, f"schema: quote is {self.quote!r}; one character, or empty for none")
        require(len(self.sparse) > 0, "schema: no sparse column; a DLRM needs at least one")
        require(self.header or bool(self.columns), "schema: header is false, so columns must name the columns")
        require_unique("column", list(self.columns))
        require_unique("dense and sparse", [column.name for column in self.dense] + [s.name for s in self.sparse])
        require(self.split.by != "time" or bool(self.timestamp), "split: by: time needs the schema's timestamp")
        check_crosses(self.sparse)
        for table, features in self.tables().items():
            rules = {feature.rule() for feature in features}
            names = ", ".join(feature.name for feature in features)
            require(len(rules) == 1, f"features {names} share table {table!r} but differ in type or ids")

    def tables(self) -> dict[str, list[Sparse]]:
        """Features by table, tables in order of their first feature."""
        tables: dict[str, list[Sparse]] = {}
        for feature in self.sparse:
            tables.setdefault(feature.table_name, []).append(feature)
        return tables

    def features(self) -> tuple[FeatureConfig, ...]:
        """The model's features."""
        return tuple(FeatureConfig(s.name, s.table_name, s.hotness, s.pooling) for s in self.sparse)

    def roles(self) -> dict[str, list[str]]:
        """Columns of the log that are read, and what each is for; all but sparse want one value a row."""
        named = [("label", self.label.column), ("weight", self.weight), ("timestamp", self.timestamp)]
        named += [("split", self.split.column)] if self.split.by == "column" else []
        named += [("dense", dense.source) for dense in self.dense] + [
            ("sparse", s.source) for s in self.sparse if not s.cross
        ]
        roles: dict[str, list[str]] = {}
        for role, name in named:
            if name or role in ("label", "dense", "sparse"):
                roles.setdefault(name, []).append(role)
        return roles

    def source_columns(self) -> list[str]:
        """Columns of the log that are read, each once."""
        return list(self.roles())

    def scalar_columns(self) -> frozenset[str]:
        """Those of them that must hold one value a row."""
        return frozenset(name for name, roles in self.roles().items() if set(roles) != {"sparse"})
