"""Which rows are train, val and test: a function of the schema's rule and of what the first pass counted."""

import dataclasses
import fnmatch
from collections.abc import Sequence

import numpy as np

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.prepare.runs import Part, Run
from dlrm_jax.data.prepare.staging import Staging
from dlrm_jax.data.schema.schema import HELD_OUT, SPLITS, Split
from dlrm_jax.data.values.hashing import hash_integers
from dlrm_jax.data.values.periods import Periods

_CODE = {name: np.uint8(code) for code, name in enumerate(SPLITS)}
_MAX_PERIODS = 10_000
"""Each has shards of its own."""


@dataclasses.dataclass
class Splitter:
    """Assigns the rows of each staged file. Build it with `make_splitter`."""

    rule: Split
    staging: Staging
    batches_F: list[list[tuple[int, int]]]
    """For each staged file, of each of its batches: which file of the log it is from, and its rows."""
    file_codes: np.ndarray
    """For rule files: the split of each file of the log."""
    bounds: np.ndarray
    """Positions, timestamps or hashes at which train ends and val ends; or the numbers of all periods."""
    order: tuple[str, ...]
    parts: list[Part]
    """What rows can belong to."""
    groups: list[Part]
    """What is counted apart: the splits; of periods those for training together, of the others each."""
    periods: Periods | None = None
    start: int = 0
    """The position in the log of the first row: how many an earlier preparation had."""

    @property
    def columns(self) -> list[str]:
        """Columns of a staged file that `codes` wants."""
        return {"time": ["time"], "column": ["split"]}.get(self.rule.by, [])

    def __post_init__(self) -> None:
        rows_F = [sum(rows for _, rows in batches) for batches in self.batches_F]
        self.first_row_F = np.cumsum([self.start, *rows_F])

    @property
    def group_of(self) -> np.ndarray:
        """The group (an index of `groups`) of each part."""
        index = {group: i for i, group in enumerate(self.groups)}
        return np.asarray([index.get(part, 0) for part in self.parts])

    @property
    def num_rows(self) -> int:
        """Rows that were staged, without those left out."""
        return int(self.first_row_F[-1]) - self.start

    def first_row(self, file: int, batch: int) -> int:
        """The position in the log of a batch's first row."""
        return int(self.first_row_F[file]) + sum(rows for _, rows in self.batches_F[file][:batch])

    def codes(self, file: int, batch: int, columns: dict[str, np.ndarray]) -> np.ndarray | int:
        """The part (an index of `parts`) of each row of a batch; one number where all have the same."""
        log_file, num_rows = self.batches_F[file][batch]
        first = self.first_row(file, batch)
        codes = np.asarray([_CODE[name] for name in self.order], np.uint8)
        if self.rule.by == "column":
            return columns["split"]
        if self.rule.by == "files":
            return int(self.file_codes[log_file])
        if self.periods is not None:
            return np.searchsorted(self.bounds, self.periods.number(columns["time"]))
        if self.rule.by in ("order", "last_part"):
            part = np.searchsorted(self.bounds, [first, first + num_rows - 1], side="right")
            if part[0] == part[1]:
                return int(codes[part[0]])
        values_R = np.arange(first, first + num_rows)
        if self.rule.by == "random":
            values_R = hash_integers(values_R, self.rule.seed)
        elif self.rule.by == "time":
            values_R = columns["time"]
        return codes[np.searchsorted(self.bounds, values_R, side="left" if self.rule.by == "time" else "right")]


def make_splitter(
    rule: Split,
    staging: Staging,
    num_files: int,
    paths: tuple[str, ...],
    periods: Periods | None = None,
    before: Sequence[Run] = (),
) -> Splitter:
    """The Splitter of a staged log, which follows the rows of `before`; ConfigError where there are no rows.

    Order, time and last_part are of the new rows alone: the first of them are for training again. Periods are those of
    all days, so that what was held out before may now be for training.
    """
    metas = [staging.meta(i) for i in range(num_files)]
    batches_F = [[(file, rows) for file, rows in meta["batches"]] for meta in metas]
    none, parts, start = np.zeros(0), [Part(name) for name in SPLITS], sum(run.rows for run in before)
    splitter = Splitter(rule, staging, batches_F, none, none, SPLITS, parts, parts, periods, start)
    num_rows = splitter.num_rows
    if not num_rows:
        examples = [example for meta in metas for example in meta["examples"]]
        skipped = f"; all were skipped, the first: {examples[0]}" if examples else ""
        raise ConfigError(f"no rows in {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}{skipped}")
    if periods is not None:
        numbers = {int(k) for time_R in staging.times(num_files) for k in np.unique(periods.number(time_R))}
        splitter.bounds = np.sort(np.asarray(list(numbers)))
        of_all = parts_of_periods(rule, sorted(numbers | {run.period for run in before if run.period is not None}))
        splitter.parts = [part for part in of_all if part.period in numbers]
        splitter.groups = [Part("train"), *(part for part in of_all if part.split != "train")]
    elif rule.by == "files":
        splitter.file_codes = np.asarray([_file_code(rule, path) for path in paths], np.uint8)
    elif rule.by == "random":
        bounds = [(1 - rule.val - rule.test) * 2**64, (1 - rule.test) * 2**64]
        splitter.bounds = np.asarray([min(int(bound), 2**64 - 1) for bound in bounds], np.uint64)
    elif rule.by == "order":
        splitter.bounds = start + np.asarray(_cuts(rule, num_rows))
    elif rule.by == "time":
        time_R = np.sort(np.concatenate(list(staging.times(num_files))))
        splitter.bounds = np.asarray([time_R[max(cut - 1, 0)] for cut in _cuts(rule, num_rows)])
    elif rule.by == "last_part":
        rows_of_file = np.zeros(len(paths), np.int64)
        for file, count in (batch for batches in batches_F for batch in batches):
            rows_of_file[file] += count
        first = num_rows - (int(rows_of_file[-1]) if not rule.parts else num_rows // rule.parts)
        splitter.bounds = start + np.asarray([first, first + (num_rows - first + 1) // 2])
        splitter.order = (SPLITS[0], rule.first_half, *(name for name in HELD_OUT if name != rule.first_half))
    return splitter


def parts_of_periods(rule: Split, numbers: list[int]) -> list[Part]:
    """The part of each period that has rows, the earliest first."""
    num_train = len(numbers) - int(rule.val) - int(rule.test)
    held_out = f"val ({rule.val:g}) and test ({rule.test:g}) leave none for train"
    require(num_train > 0, f"split: the log has {len(numbers)} periods of {rule.period}, of which {held_out}")
    what = f"split: period {rule.period} cuts the log into {len(numbers):,} periods"
    require(len(numbers) <= _MAX_PERIODS, f"{what}; at most {_MAX_PERIODS:,}, so make it longer")
    splits = ["train"] * num_train + ["val"] * int(rule.val) + ["test"] * int(rule.test)
    return [Part(split, number) for split, number in zip(splits, numbers, strict=True)]


def _cuts(rule: Split, num_rows: int) -> list[int]:
    return [int(num_rows * (1 - rule.val - rule.test) + 1e-9), int(num_rows * (1 - rule.test) + 1e-9)]


def _file_code(rule: Split, path: str) -> np.uint8:
    for name, pattern in (("val", rule.val_files), ("test", rule.test_files)):
        if pattern and (fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern)):
            return _CODE[name]
    return _CODE["train"]
