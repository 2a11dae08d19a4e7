"""Prepare a click log for training: `python -m dlrm_jax.prepare --input='day_*.gz' --output=data/x --schema=infer`."""

import os
import pathlib
import sys
import time

from absl import flags

from dlrm_jax.cli import commands
from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.source import expand
from dlrm_jax.data.infer.choose import choose_schema
from dlrm_jax.data.prepare.bar import Bar
from dlrm_jax.data.prepare.blocks import COMPRESSIONS
from dlrm_jax.data.prepare.extend import open_past
from dlrm_jax.data.prepare.preparation import BAD_ROW_POLICIES, Options, prepare
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.values.label_values import one_class_warnings, shown_texts
from dlrm_jax.host import files
from dlrm_jax.host.heap import keep_freed_chunks

FLAGS = flags.FLAGS
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def define_flags() -> None:
    """Define this command's flags."""
    presets = "; ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items())
    flags.DEFINE_string(
        "input",
        "",
        "Files or globs, separated by commas; a name that is there is taken as it is. Plain, gzip, zstd or bz2.",
    )
    flags.DEFINE_string("output", "", "The new dataset's directory; the same command goes on in it after a stop.")
    flags.DEFINE_string(
        "schema",
        "infer",
        f"A YAML or JSON file; infer, which guesses and writes OUTPUT/schema.yaml with its reasons; or {presets}.",
    )
    flags.DEFINE_enum(
        "on_bad_row", "error", BAD_ROW_POLICIES, "A row that cannot be used ends the run, or is left out and counted."
    )
    flags.DEFINE_string("max_memory", "", "Upper limit for memory, as 4GB; the run ends clearly before it goes beyond.")
    flags.DEFINE_enum("compression", "none", COMPRESSIONS, "Of the records: zstd halves the disk, none reads faster.")
    flags.DEFINE_string(
        "extend",
        "",
        "A finished dataset: OUTPUT is it and the rows of --input, known values keep their ids, its files are linked.",
    )
    flags.DEFINE_bool("refit", False, "With --extend: fit transforms to all days for the new rows, and for serving.")
    flags.DEFINE_string("describe", "", "Show the statistics of this prepared dataset as a table and pictures instead.")


def main() -> None:
    """Flags to schema and options; prepare; say what there is now."""
    if FLAGS.describe:
        from dlrm_jax.data.prepare.describe import describe  # Draws pictures, which takes a second to import.

        print(describe(pathlib.Path(FLAGS.describe)))
        return
    if not FLAGS.output:
        raise ConfigError("--output is missing; it names the new dataset's directory")
    output = pathlib.Path(FLAGS.output)
    files.require_output_directory("output", output)
    extend = pathlib.Path(FLAGS.extend) if FLAGS.extend else None
    options = Options(FLAGS.on_bad_row, parse_bytes(FLAGS.max_memory), FLAGS.compression, extend, FLAGS.refit)
    paths = expand(FLAGS.input)
    past = open_past(extend, output) if extend else None
    schema = past.schema if past and FLAGS.schema == "infer" else choose_schema(FLAGS.schema, paths)
    for reason in () if past else schema.reasons:
        print(f"schema: {reason}", file=sys.stderr)
    keep_freed_chunks()
    start = time.perf_counter()
    with Bar() as bar:
        statistics = prepare(paths, output, schema, options, bar.show)
    _print_summary(output, statistics, time.perf_counter() - start, past.rows if past else 0)


def parse_bytes(text: str) -> int:
    """`4GB`, `512M` or plain bytes; 0 for nothing."""
    upper = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = upper[-1:] if upper[-1:].isalpha() else ""
    try:
        value = float(upper.removesuffix(unit) or "0") * _UNITS[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"--max_memory={text} is no amount of memory, as 4GB or 512MB") from None
    if not 0 <= value < 2**63:
        raise ConfigError(f"--max_memory={text} is no amount of memory, as 4GB or 512MB")
    return int(value)


def _print_summary(output: pathlib.Path, statistics: dict, seconds: float, before: int) -> None:
    skipped = statistics["skipped"]
    if skipped["rows"]:
        print(f"skipped {skipped['rows']:,} rows:")
        for reason, count in sorted(skipped["reasons"].items(), key=lambda item: -item[1])[:20]:
            print(f"  {count:,}  {reason}")
        print(f"  the first: {skipped['examples'][0]}")
    for name, feature in statistics["features"].items():
        if feature["truncated_ids"]:
            print(f"{name}: {feature['truncated_ids']:,} ids beyond hotness {feature['hotness']} were left out")
    splits = statistics["splits"]
    negative = statistics.get("negative_texts")
    if negative:
        print(f"label: counted as negative: {shown_texts(negative)}")
    for note in statistics.get("notes", ()):
        print(f"note: {note}")
    for warning in one_class_warnings(splits):
        print(f"warning: {warning}", file=sys.stderr)
    rows = sum(split["rows"] for split in splits.values())
    parts = ", ".join(f"{name} {split['rows']:,}" for name, split in splits.items())
    tables = statistics["tables"].values()
    new = f" of which {rows - before:,} are new" if before else ""
    print(
        f"{rows:,} rows ({parts}){new}, {len(tables)} tables of {sum(table['rows'] for table in tables):,} rows in all"
    )
    rate = f"{(rows - before) / seconds:,.0f} rows/s"
    print(f"prepared in {seconds:.1f} s ({rate}); train with --data_dir={os.fspath(output)}")


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    commands.run_command(main)


if __name__ == "__main__":
    command()
