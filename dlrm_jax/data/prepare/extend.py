"""Which dataset can grow by which log (`--extend`), and what is then not as one preparation of all days makes it."""

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

from dlrm_jax.config import ConfigError, differences, require, tell
from dlrm_jax.data.formats.source import Source
from dlrm_jax.data.formats.text_source import TextSource
from dlrm_jax.data.prepare.growth import Past
from dlrm_jax.data.prepare.hashes import HASHES
from dlrm_jax.data.prepare.runs import Run
from dlrm_jax.data.read.prepared import is_prepared, read_json, read_schema
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.data.schema.schema_io import to_dict
from dlrm_jax.data.values.dense import DenseStatistics

_FEW_ROWS = 100
"""Of fewer rows it may be chance that no bag has two ids."""


def open_past(directory: pathlib.Path, output: pathlib.Path, schema: Schema | None = None) -> Past:
    """The dataset that is to grow into `output`; ConfigError if it cannot, or has another schema."""
    where = f"--extend={directory}"
    if not is_prepared(directory):
        unfinished = (directory / "staging").exists()
        what = "an unfinished preparation; run its command again first" if unfinished else "no prepared dataset"
        raise ConfigError(f"{where} holds {what}; name the --output of a finished dlrm_jax.prepare")
    old, new = directory.resolve(), output.resolve()
    require(old != new, f"--output={output} is the dataset of --extend, which stays as it is; name a new directory")
    inside = old in new.parents or new in old.parents
    require(not inside, f"--output={output} and {where} lie one in the other; name a directory beside it")
    past = Past.read(directory, read_schema(directory))
    if schema is not None:
        different = differences(_without_reasons(schema), _without_reasons(past.schema))
        require(
            not different,
            f"--schema differs from that of {where} (now != then): {tell(different)}; leave --schema out, or prepare "
            "all days anew with it",
        )
    for path in (path for paths in past.shard_paths() for path in paths):
        require(path.is_file(), f"{path} is missing; prepare that dataset anew")
    return past


def _without_reasons(schema: Schema) -> dict[str, Any]:
    return {key: value for key, value in to_dict(schema).items() if key != "reasons"}


def job_of_past(past: Past) -> dict[str, Any]:
    """What job.json says of the dataset that grew: a hash of all that it says, and the files of the days before."""
    if past.directory is None:
        return {}
    job = read_json(past.directory / "job.json")
    hashes = (past.directory / HASHES).read_bytes()
    return {"extends": hashlib.sha256(hashes).hexdigest(), "before": [*job.get("before", ()), job["inputs"]]}


def delimiter_of(source: Source) -> str | None:
    """What separates the columns of delimited text."""
    return source.delimiter if isinstance(source, TextSource) and not source.is_json else None


def require_same_delimiter(source: Source, past: Past) -> None:
    """ConfigError where the columns of a log are separated otherwise than before."""
    now, then = delimiter_of(source), past.growth.get("delimiter")
    require(
        past.directory is None or now == then or None in (now, then),
        f"{source.paths[0]}: its columns are separated by {now!r}, those of --extend={past.directory} by {then!r}; "
        "write the file as those before, or prepare all days anew with a delimiter in the schema",
    )


def require_same_separators(schema: Schema, past: Past, lookups: dict[str, tuple[int, int]], rows: int) -> None:
    """ConfigError for a column of lists that has none any more; of new rows, `lookups` are ids and empty bags."""
    for feature in schema.sparse:
        ids_before, empty_before = past.growth.get("lookups", {}).get(feature.name, (0, 0))
        ids, empty = lookups[feature.name]
        bags_before = past.rows - empty_before
        mean = ids_before / max(bags_before, 1)
        require(
            not (feature.separator and mean > 1.2 and rows - empty >= _FEW_ROWS and ids == rows - empty),
            f"column {feature.source}: none of the {rows - empty:,} new lists has two values, those before had "
            f"{mean:.2f} on average; is their separator still {feature.separator!r}? Write them as before, or prepare "
            "all days anew",
        )


def notes(past: Past, runs: list[Run], now: dict[int, DenseStatistics], refit: bool) -> Iterator[str]:
    """What one preparation of all days would have done otherwise, but for ids, a line each; `now` is of all days."""
    if past.directory is None:
        return
    split = past.schema.split
    if split.period:
        before = {run.period: run.split for run in past.runs}
        moved = sum(run.split != before.get(run.period, run.split) for run in runs)
        if moved:
            yield f"split: {moved} periods are now in another split, since val and test are the last ones"
    elif split.by in ("order", "time", "last_part"):
        yield (
            f"split: by {split.by} cuts the new rows by themselves, and the days before keep their splits; one "
            "preparation of all days would cut elsewhere"
        )
    then = past.dense(fitted=True)
    for i, own in now.items():
        name, was = past.schema.dense[i].name, then[i]
        if own == was:
            continue
        values = f"mean {was.centre:.6g}, deviation {was.deviation:.6g}, least {was.least:.6g}"
        values += f"; of all days {own.centre:.6g}, {own.deviation:.6g}, {own.least:.6g}"
        what = "is refitted for the new rows and for serving, while rows of the days before keep" if refit else "keeps"
        yield f"{name}: its transform {what} the statistics of the days before ({values})"
