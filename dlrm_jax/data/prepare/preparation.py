"""Preparation: raw log -> prepared dataset directory, in two passes, restartable at any point.

    first pass    log -> DIR/staging: rows with provisional ids              (first_pass.py)
    second pass   counts -> splits, vocabularies, statistics -> shards       (second_pass.py)
    the end       TFDS' dataset_info.json appears, DIR/staging disappears

Only a directory with dataset_info.json is finished; until then a second run of the same command goes on.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dlrm_jax.config import ConfigError, differences, require, tell
from dlrm_jax.data.formats.open_log import log_files, open_log
from dlrm_jax.data.formats.source import list_names
from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.prepare.extend import delimiter_of, job_of_past, open_past, require_same_delimiter
from dlrm_jax.data.prepare.first_pass import FirstPass
from dlrm_jax.data.prepare.growth import Past, write_growth
from dlrm_jax.data.prepare.runs import shard_lengths
from dlrm_jax.data.prepare.second_pass import SecondPass
from dlrm_jax.data.prepare.splits import make_splitter
from dlrm_jax.data.prepare.staging import Staging, write_whole
from dlrm_jax.data.read.prepared import is_prepared, read_json
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.data.schema.schema_io import dump_yaml, to_dict
from dlrm_jax.data.values.label_values import check_label
from dlrm_jax.data.values.periods import Periods
from dlrm_jax.host import files, memory

BAD_ROW_POLICIES = ("error", "skip_and_count")
_FIXED_BYTES = 700 << 20
"""What Python, the chunks in work and one staged file take; the rest of --max_memory is for vocabularies."""
_BYTES_PER_KEY_RATIO = 2.5
"""The second pass holds counts and new ids beside what the first pass' tables took."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a preparation is: rows, and the share of the present pass that is done."""

    phase: str
    rows: int
    fraction: float


@dataclasses.dataclass(frozen=True)
class Options:
    """How to prepare, where it does not change what a row means; and which dataset the new one grows from.

    `refit` fits transforms that have statistics to all days, instead of keeping them as they were.
    """

    on_bad_row: str = "error"
    max_memory: int = 0
    compression: str = "none"
    extend: pathlib.Path | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        if self.max_memory and self.max_memory < _FIXED_BYTES * 5 // 4:
            raise ConfigError(f"--max_memory is below the least of {_FIXED_BYTES * 5 // 4 >> 20} MB")
        require(self.extend is not None or not self.refit, "--refit has no effect without --extend")


def prepare(
    paths: tuple[str, ...],
    output: pathlib.Path,
    schema: Schema,
    options: Options | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Prepare a log; returns its statistics. Goes on where a killed preparation of the same stopped.

    Raises ConfigError for a bad row, a file that cannot be read, a full disk, or a directory that holds something else.
    """
    options = options or Options()
    past = open_past(options.extend, output, schema) if options.extend else Past(schema)
    job = _job(paths, schema, options, past)
    if not is_prepared(output):
        _require_usable(output)
    elif not (output / "staging").exists() and not (output / files.LOCK).exists():
        return _finished(output, job)
    staging = Staging(output)
    times = {"modified": [pathlib.Path(path).stat().st_mtime_ns for path in log_files(paths, schema)]}
    with _alone(output):
        if is_prepared(output):  # By another since the first look, or by a run that was killed at the very end.
            shutil.rmtree(staging.directory, ignore_errors=True)
            return _finished(output, job)
        staging.begin(json.loads(json.dumps(job | times)))
        statistics = _run(paths, output, past, options, staging, progress, job)
        shutil.rmtree(staging.directory)
    return statistics


def _run(
    paths: tuple[str, ...],
    output: pathlib.Path,
    past: Past,
    options: Options,
    staging: Staging,
    progress: Callable[[Progress], None],
    job: dict[str, Any],
) -> dict[str, Any]:
    schema = past.schema
    source = open_log(paths, schema)
    require_same_delimiter(source, past)
    vocabulary_memory = int((options.max_memory - _FIXED_BYTES) / _BYTES_PER_KEY_RATIO) if options.max_memory else 0
    first = FirstPass(schema, source, staging, options.on_bad_row == "skip_and_count", vocabulary_memory, past)
    total = max(source.num_bytes, 1)
    num_files = first.run(lambda rows, done: progress(Progress("reading", rows, done / total)))
    del first  # With its hash tables, before the counts are made.
    metas = [staging.meta(i) for i in range(num_files)]
    negative = _check_columns(paths, staging, metas, past)
    splitter = make_splitter(schema.split, staging, num_files, paths, _periods(staging, metas, past), past.runs)
    num_rows = splitter.num_rows
    memory.require_threads()  # The first shard starts array_record's, beside what the vocabularies take.
    second = SecondPass(schema, output, staging, num_files, splitter, options.compression, past, options.refit)
    progress(Progress("counting", num_rows, 0.0))
    statistics = second.run(lambda rows: progress(Progress("writing", rows, rows / num_rows)))
    before = past.statistics.get("skipped", {})
    statistics = {"name": schema.name, "skipped": _skipped(metas, before), "negative_texts": negative} | statistics
    if not statistics["splits"]["train"]["rows"]:
        raise ConfigError(f"none of the {num_rows} rows is for training under split: by: {schema.split.by}")
    growth = {"next_row": metas[-1]["row"], "times": _times(metas, past), "delimiter": delimiter_of(source)}
    write_growth(output, growth | second.growth())
    write_whole(output / "job.json", json.dumps(job, indent=1).encode())
    write_whole(output / "statistics.json", json.dumps(statistics, indent=1).encode())
    write_whole(output / "schema.yaml", dump_yaml(schema).encode())
    write_whole(output / "schema.json", json.dumps(to_dict(schema), indent=1).encode())
    widths = (len(schema.dense), sum(feature.hotness for feature in schema.sparse))
    blocks.write_metadata(output, schema.name, widths, bool(schema.weight), shard_lengths(second.runs))
    return statistics


def _job(paths: tuple[str, ...], schema: Schema, options: Options, past: Past) -> dict[str, Any]:
    files_of_log = map(pathlib.Path, log_files(paths, schema))
    inputs = [{"file": path.name, "bytes": path.stat().st_size} for path in files_of_log]
    return {
        "schema": {key: value for key, value in to_dict(schema).items() if key != "reasons"},
        "inputs": inputs,
        "on_bad_row": options.on_bad_row,
        "compression": options.compression,
        "version": blocks.VERSION,
    } | ({"refit": options.refit} | job_of_past(past) if options.extend else {})


def _finished(output: pathlib.Path, job: dict[str, Any]) -> dict[str, Any]:
    different = differences(json.loads(json.dumps(job)), read_json(output / "job.json"))
    if different:
        raise ConfigError(
            f"{output} holds a dataset prepared from something else (now != then): {tell(different)}; "
            "choose another directory, or delete it"
        )
    return read_json(output / "statistics.json")


def _require_usable(output: pathlib.Path) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; it must be a directory, new or empty")
    strangers = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if strangers and "staging" not in strangers and strangers != [".lock"]:
        what = f"{output} is not empty (it holds {strangers[0]}) and no prepared dataset"
        raise ConfigError(f"{what}; choose a new directory, or delete it")


@contextlib.contextmanager
def _alone(output: pathlib.Path) -> Iterator[None]:
    """Keep a second preparation out of the same directory; the lock goes with the process that holds it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / files.LOCK
    with files.alone(path, f"another preparation is running in {output}"):
        try:
            yield
        finally:
            path.unlink()


def _times(metas: list[dict[str, Any]], past: Past) -> dict[str, int]:
    """How many timestamps are dates, and how many numbers."""
    found = [*(meta.get("times", {}) for meta in metas), past.growth.get("times", {})]
    return {kind: sum(times.get(kind, 0) for times in found) for kind in ("dates", "numbers")}


def _require_one_kind_of_time(column: str, dates: int, numbers: int) -> None:
    """ConfigError where a column holds dates and numbers: these cannot be told to be before or after each other."""
    require(
        not (dates and numbers),
        f"column {column} is a number in {numbers:,} rows and a date in {dates:,}, which have no common order; make "
        "them one kind, or leave timestamp out of the schema",
    )


def _periods(staging: Staging, metas: list[dict[str, Any]], past: Past) -> Periods | None:
    """The periods by which the log is split, where the schema says so."""
    split, column = past.schema.split, past.schema.timestamp
    if past.periods or not split.period:
        return past.periods
    ranges = [(int(time_R.min()), int(time_R.max())) for time_R in staging.times(len(metas)) if len(time_R)]
    if not ranges:
        return None  # The splitter says that there are no rows.
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return Periods.of(split.period, column, bool(_times(metas, past)["dates"]), low, high)


def _check_columns(paths: tuple[str, ...], staging: Staging, metas: list[dict[str, Any]], past: Past) -> dict[str, int]:
    """What only the whole log tells: that each column is there, and each positive label; the negative ones' counts."""
    schema = past.schema
    try:
        names = sorted({name for meta in metas for name in meta.get("names", ())})
        if names:
            where = paths[0] if len(paths) == 1 else f"the {len(paths)} files"
            for name in schema.source_columns():
                require(name in names, f"no line of {where} has {name!r}; the lines have {list_names(names)}")
        _require_one_kind_of_time(schema.timestamp, **_times(metas, past))
        if not schema.label.positive:
            return {}
        texts: dict[str, collections.Counter[str]] = {path: collections.Counter() for path in paths}
        for file, counts in (item for meta in metas for item in meta.get("label_texts", ())):
            texts[paths[file]].update(counts)
        if past.directory is not None:  # Whose positive texts are all there, and were not counted.
            known = dict.fromkeys(schema.label.positive, 1) | past.statistics["negative_texts"]
            texts = {str(past.directory): collections.Counter(known)} | texts
        return check_label(schema.label, texts) if any(texts.values()) else {}
    except ConfigError:
        # With this schema no run can end otherwise, and with another the rows must be read again.
        shutil.rmtree(staging.directory)
        raise


def _skipped(metas: list[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """How many rows were left out, why, and the first of them; `before` is of the days before."""
    reasons = collections.Counter(before.get("reasons", {}))
    examples = list(before.get("examples", ()))
    for meta in metas:
        reasons.update(meta["skipped"])
        examples += meta["examples"][: 20 - len(examples)]
    return {"rows": sum(reasons.values()), "reasons": dict(sorted(reasons.items())), "examples": examples}
