"""Scored rows judged: all metrics with GAUC, by slices, each with its interval; and two models on the same rows."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.read.dataset import Dataset, Rows
from dlrm_jax.judging.bootstrap import Bootstrap, Difference, difference, resampled
from dlrm_jax.judging.columns import Column, group_numbers, read_columns, require_columns, slices_of
from dlrm_jax.judging.measures import Measured, Units
from dlrm_jax.model.metrics import Scored


@dataclasses.dataclass(frozen=True)
class Options:
    """Columns by which to group and to slice, how many slices each has at most, and the bootstrap if there is one."""

    group_by: str = ""
    slice_by: tuple[str, ...] = ()
    max_slices: int = 20
    bootstrap: Bootstrap | None = None

    def __post_init__(self) -> None:
        require(self.max_slices >= 2, f"--max_slices={self.max_slices}; it must be at least 2")
        require(
            len(set(self.slice_by)) == len(self.slice_by),
            f"--slice_by={','.join(self.slice_by)} names a column twice",
        )


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Metrics of some rows by name, and where there is a bootstrap the interval of each."""

    text: str
    num_rows: int
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Groups:
    """What GAUC is of: groups that have both classes; those of one, left out, and their share of the impressions."""

    column: str
    num_groups: int
    one_class_groups: int
    one_class_share: float


@dataclasses.dataclass(frozen=True)
class Report:
    """A split judged: as a whole and, by column, its slices."""

    whole: Judgement
    groups: Groups | None
    slices: Mapping[str, Sequence[Judgement]]
    bootstrap: Bootstrap | None


def require_possible(dataset: Dataset, options: Options) -> None:
    """ConfigError for columns that the dataset does not have."""
    asked = {"group_by": [options.group_by] if options.group_by else [], "slice_by": options.slice_by}
    require_columns(dataset, asked)


def judge(rows: Scored, split: Rows, dataset: Dataset, options: Options, data_dir: str = "") -> Report:
    """`rows` are the scores of every row of `split` in its order; those of weight 0 count nowhere.

    `dataset` need not be the model's: it has the columns of `options`. `data_dir` is where its vocabularies are, by
    which slices are named as in the log.
    """
    require_possible(dataset, options)
    counted = rows.weight_R > 0
    units = units_of_split(split, dataset, options.group_by).only(counted)
    rows = rows.kept(counted)
    require(len(rows) > 0, "the split has no rows to judge")
    whole = Measured(rows, units)
    sets, places = [("all", whole)], {}
    for name, parts in parts_of_split(split, dataset, options, data_dir).items():
        kept = [(text, part_R[counted]) for text, part_R in parts]
        own = [(text, Measured(rows.kept(part), units.part(part))) for text, part in kept if part.any()]
        places[name] = range(len(sets), len(sets) + len(own))
        sets += own
    judged = _judgements(sets, units.num_units, options.bootstrap)
    groups = None
    if options.group_by:
        groups = Groups(options.group_by, whole.num_groups, whole.one_class_groups, whole.one_class_share)
    slices_by = {name: [judged[i] for i in of] for name, of in places.items()}
    return Report(judged[0], groups, slices_by, options.bootstrap)


def parts_of_split(
    split: Rows, dataset: Dataset, options: Options, data_dir: str = ""
) -> dict[str, list[tuple[str, np.ndarray]]]:
    """By column of slices, as it is called there: each slice in words, and which rows of the split it has."""
    columns, parts = read_columns(dataset, split, options.slice_by), {}
    for name in options.slice_by:
        slices = slices_of(columns[name], options.max_slices, dataset, data_dir)
        parts[slices.name] = [(text, slices.number_R == i) for i, text in enumerate(slices.texts)]
    return parts


def units_of_split(split: Rows, dataset: Dataset, group_by: str) -> Units:
    """Rows that are drawn together: those of a group, or each alone where there are none."""
    if not group_by:
        return Units.of_rows(len(split))
    return _units(read_columns(dataset, split, [group_by])[group_by])


def _units(column: Column) -> Units:
    number_R, num_groups = group_numbers(column)
    return Units(number_R, num_groups, groups=True)


def _judgements(sets: Sequence[tuple[str, Measured]], num_units: int, bootstrap: Bootstrap | None) -> list[Judgement]:
    intervals: list[dict[str, tuple[float, float]]] = [{} for _ in sets]
    if bootstrap is not None:
        samples = resampled([one for _, one in sets], num_units, bootstrap)
        intervals = [bootstrap.intervals(of_set) for of_set in samples]
    return [Judgement(text, one.num_rows, one.values(), its) for (text, one), its in zip(sets, intervals, strict=True)]


@dataclasses.dataclass(frozen=True)
class Compared:
    """Two models' metrics on the same rows, and the second's minus the first's."""

    text: str
    num_rows: int
    first: Mapping[str, float]
    second: Mapping[str, float]
    differences: Mapping[str, Difference]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models compared on a split as a whole and, by column, on its slices."""

    whole: Compared
    slices: Mapping[str, Sequence[Compared]]
    bootstrap: Bootstrap


def compare(
    first: Scored,
    second: Scored,
    units: Units,
    bootstrap: Bootstrap,
    parts_by: Mapping[str, Sequence[tuple[str, np.ndarray]]] | None = None,
) -> Comparison:
    """Both score the same rows in the same order; every resample is of both, so that what rows share cancels out.

    `parts_by` are the slices, as `parts_of_split` gives them.
    """
    counted = first.weight_R > 0
    units = units.only(counted)
    kept = {name: [(text, part_R[counted]) for text, part_R in parts] for name, parts in (parts_by or {}).items()}
    found = {name: [(text, part) for text, part in parts if part.any()] for name, parts in kept.items()}
    every = [("all", np.ones(counted.sum(), bool)), *(one for parts in found.values() for one in parts)]
    models = [rows.kept(counted) for rows in (first, second)]
    sets = [Measured(rows.kept(part), units.part(part)) for _, part in every for rows in models]
    samples = resampled(sets, units.num_units, bootstrap)
    compared = iter(
        [
            _compared(text, sets[2 * i : 2 * i + 2], samples[2 * i : 2 * i + 2], bootstrap)
            for i, (text, _) in enumerate(every)
        ]
    )
    whole = next(compared)
    return Comparison(whole, {name: [next(compared) for _ in parts] for name, parts in found.items()}, bootstrap)


def _compared(
    text: str, sets: Sequence[Measured], samples: Sequence[Mapping[str, np.ndarray]], bootstrap: Bootstrap
) -> Compared:
    first, second = (one.values() for one in sets)
    found = {
        name: difference(first[name], second[name], samples[0][name], samples[1][name], bootstrap) for name in first
    }
    return Compared(text, sets[0].num_rows, first, second, found)


def rows_fingerprint(split: Rows) -> str:
    """A checksum of which rows these are: their numbers in the raw log, labels and weights, in their order.

    Not of the inputs, so that models of other columns, or of the same log prepared otherwise, can be compared.
    """
    checksum = 0
    for window, order in split.windows(0, 0, shuffle=False):
        weight_R = np.ones(len(window), np.float32) if window.weight_R is None else window.weight_R
        for column, dtype in ((window.row_R, np.int64), (window.label_R, np.float32), (weight_R, np.float32)):
            checksum = zlib.crc32(np.ascontiguousarray(column[order], dtype).data, checksum)
    return f"{checksum:08x}"


def require_same_rows(first: Rows, second: Rows, where: str) -> None:
    """ConfigError unless both splits are the same rows of a log; `where` names flag and split."""
    ours, theirs = ((len(split), rows_fingerprint(split)) for split in (first, second))
    if ours != theirs:
        raise ConfigError(
            f"{where} has other rows: {theirs[0]:,} of fingerprint {theirs[1]}, against {ours[0]:,} of {ours[1]}; "
            "it must be the same log under the same split"
        )
