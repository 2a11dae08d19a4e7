"""Renew what of these pages is made of the code: `python docs/make_pages.py`; `--check` only says what is not current.

FLAGS.md is every flag of every command. REFERENCE.md has the table of dlrm_jax/compat/reference_flags.py. SCHEMA.md
has, below each example, what becomes of its log. tests/docs_test.py holds them current.
"""

import argparse
import dataclasses
import importlib
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import yaml
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from flag_examples import EXAMPLES, UNITS

from dlrm_jax import compat
from dlrm_jax.cli import commands
from dlrm_jax.cli.flags import LEARNING_DEFAULTS, run_settings
from dlrm_jax.config import InteractionConfig, LossConfig, OptimizerConfig, ScheduleConfig, Setting, settings
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.data.schema.schema_io import from_dict
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.publish_options import PublishOptions
from dlrm_jax.training.record_options import RecordOptions
from dlrm_jax.training.run_config import ModelOptions, RunConfig

DOCS = pathlib.Path(__file__).resolve().parent

GROUPS = (
    ("The data", DataConfig),
    ("The model", ModelOptions),
    ("The loss", LossConfig),
    ("The learning rate", ScheduleConfig),
    ("The optimizers", OptimizerConfig),
    ("The run", RunConfig),
    ("Several devices", ShardingOptions),
    ("Records of the run", RecordOptions),
    ("Versions while it trains", PublishOptions),
)
"""The dataclasses whose fields are the flags of a run, in the order in which data flows."""
OF_RUNS = ("train", "plan", "benchmark", "tune", "online")
"""Commands that take the flags of a run."""
COMMANDS = (
    "train",
    "prepare",
    "evaluate",
    "plan",
    "benchmark",
    "tune",
    "online",
    "report",
    "export",
    "serve",
    "loadtest",
)

_TOP = """# Every flag

Made by `python docs/make_pages.py` of the dataclasses in which flags are written; `python -m dlrm_jax.COMMAND --help`
says the same. Flags are written `--name=value`; of one that is on or off, `--name` and `--noname`. `--flagfile=FILE`
reads them from a file, one a line, where `#` begins a comment; later ones win. `-` is a number without a unit.

Those of a run come first: `train`, `plan`, `benchmark`, `tune` and `online` take all of them.
"""
_HEAD = "| flag | default | unit | what it is | example |\n|---|---|---|---|---|"


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag as a row of FLAGS.md has it."""

    name: str
    default: Any
    words: str
    choices: tuple[str, ...] = ()
    command: str = ""

    def row(self, parser: flags.ArgumentParser) -> str:
        """The row; its example has to be one that `parser` takes."""
        default = _text(self.default)
        words = self.words
        if self.choices:
            words += f" One of {', '.join(choice or '(empty)' for choice in self.choices)}."
        is_number = isinstance(parser, flags.IntegerParser | flags.FloatParser)
        unit = UNITS.get(self.name, "")
        assert unit or not is_number, f"flag_examples.py has no unit of --{self.name}"
        cells = (f"`--{self.name}`", f"`{default}`" if default else "", unit, words, f"`{self.example(parser)}`")
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    def example(self, parser: flags.ArgumentParser) -> str:
        """What one might type."""
        value = EXAMPLES.get(f"{self.command}.{self.name}")
        if value is None and isinstance(parser, flags.BooleanParser):
            return f"--no{self.name}" if self.default else f"--{self.name}"
        if value is None and self.choices:
            value = next(choice for choice in self.choices if choice and choice != _text(self.default))
        value = value or EXAMPLES.get(self.name) or _text(self.default)
        assert value, f"flag_examples.py has no example of --{self.name}"
        parser.parse(value)
        return f"--{self.name}={value}"


def flags_page() -> str:
    """FLAGS.md."""
    known, parts, shown = run_settings(), [_TOP], set()
    of_train = {flag.name: flag for flag in flags_of("train")}
    groups = [(title, [one.flag for path, one in settings(config) if len(path) == 1]) for title, config in GROUPS]
    own = {one.flag for _, one in settings(RunConfig)}
    groups.insert(2, ("Options of interactions", [name for name in known if name not in own]))
    groups.append(("Others", list(known)))
    for title, names in groups:
        names = [name for name in names if name not in shown]
        if not names:
            continue
        shown |= set(names)
        rows = [_of_setting(known[name]).row(of_train[name].parser) for name in names]
        if title == "The run":
            rows.insert(0, _of_flag(of_train["workdir"]).row(of_train["workdir"].parser))
        parts.append(_section(title, rows))
    for command in COMMANDS:
        found = flags_of(command)
        if command in OF_RUNS:
            found = [flag for flag in found if flag.name not in known and flag.name != "workdir"]
        title = f"`{command}`{', beside those of a run' if command in OF_RUNS else ''}"
        parts.append(_section(title, [_of_flag(flag, command).row(flag.parser) for flag in found]))
    return "\n".join(parts)


def _section(title: str, rows: list[str]) -> str:
    return "\n".join([f"## {title}", "", _HEAD, *rows, ""])


def _of_setting(known: Setting) -> Flag:
    default = known.default.name if isinstance(known.default, InteractionConfig) else known.default
    words = known.help
    bounds = [f"at least {known.at_least:g}"] if known.at_least else []  # That nothing is below 0 goes without saying.
    bounds += [f"above {known.above:g}"] if known.above is not None else []
    bounds += [f"below {known.below:g}"] if known.below is not None else []
    words += f" It is {' and '.join(bounds)}." if bounds else ""
    if known.needs and not words.startswith("--interaction"):  # Those say it themselves.
        words += f" No effect elsewhere: {known.needs.words}."
    return Flag(known.flag, LEARNING_DEFAULTS.get(known.flag, default), words, known.choices)


def _of_flag(flag: flags.Flag, command: str = "") -> Flag:
    words = re.sub(r"^<.*?>: ", "", flag.help)  # absl's own list of the choices.
    return Flag(flag.name, flag.default, words, tuple(getattr(flag.parser, "enum_values", None) or ()), command)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def flags_of(command: str) -> list[flags.Flag]:
    """The flags that a command defines, in its order; nothing of them is left defined."""
    commands.run_command = lambda main, **_: None  # Commands define their flags, and then run.
    module = importlib.import_module(f"dlrm_jax.{command}")
    before = set(flags.FLAGS)
    module.command()
    own = [flags.FLAGS[name] for name in flags.FLAGS if name not in before]
    ordered = [flag for by in flags.FLAGS.flags_by_module_dict().values() for flag in by]
    names = list(dict.fromkeys(flag.name for flag in ordered if flag in own))
    found = {flag.name: flag for flag in own}
    for name in names:
        delattr(flags.FLAGS, name)
    return [found[name] for name in names]


def reference_table() -> str:
    """Every flag of the reference beside ours."""
    lines = ["| the reference | its default | here | in a replay |", "|---|---|---|---|"]
    for flag in compat.REFERENCE_FLAGS:
        default = f"`{_text(flag.default)}`" if flag.default not in (None, "") else ""
        lines.append(f"| `--{flag.name}` | {default} | {flag.ours} | {flag.use} |")
    return "\n".join(lines)


_EXAMPLE = re.compile(r"```yaml\n((?:(?!```).)*)```\n\n```text\n.*?```", re.DOTALL)
_LOG = re.compile(r"```csv\n(.*?)```", re.DOTALL)
_REST = {"name": "shop", "label": "click", "sparse": ["user"], "split": {"by": "files", "test_files": "none"}}


def schema_page(page: str) -> str:
    """SCHEMA.md, with what becomes of the log below each example."""

    def shown(match: re.Match) -> str:
        log = [found[1] for found in _LOG.finditer(page[: match.start()])][-1]
        return f"```yaml\n{match[1]}```\n\n```text\n{becomes(match[1], log)}```"

    return _EXAMPLE.sub(shown, page)


def becomes(example: str, log: str) -> str:
    """What becomes of a log under a schema, whose rest is `_REST`: a line for each column that the example names."""
    asked = yaml.safe_load(example)
    schema = from_dict(_REST | asked)
    with tempfile.TemporaryDirectory() as folder:
        paths = _written(pathlib.Path(folder), log, schema)
        prepare(paths, pathlib.Path(folder) / "out", schema)
        dataset = open_prepared(pathlib.Path(folder) / "out")
        splits = {name: rows.whole() for name, rows in dataset.splits.items()}
    if "split" in asked:
        return "".join(f"{name:5}  rows {_joined(sorted(rows.row_R))}\n" for name, rows in splits.items())
    rows = splits["train"]
    lines = [("label", [f"{value:g}" for value in rows.label_R])] if "label" in asked else []
    lines += [("weight", [f"{value:g}" for value in rows.weight_R])] if "weight" in asked else []
    lines += [(one.name, [f"{x:.3g}" for x in rows.dense_RxN[:, i]]) for i, one in enumerate(schema.dense)]
    first = 0
    for feature in schema.sparse if "sparse" in asked else ():
        bags = rows.ids_RxK[:, first : first + feature.hotness]
        lines.append((feature.name, [",".join(str(i) for i in bag if i >= 0) or "-" for bag in bags]))
        first += feature.hotness
    wide = max(len(name) for name, _ in lines)
    columns = [max(len(values[i]) for _, values in lines) for i in range(len(lines[0][1]))]
    return "".join(
        f"{name:{wide}}  " + "  ".join(f"{value:>{n}}" for value, n in zip(values, columns, strict=True)) + "\n"
        for name, values in lines
    )


def _joined(numbers: Iterable[int]) -> str:
    return " ".join(str(number) for number in numbers) or "none"


def _written(folder: pathlib.Path, log: str, schema: Schema) -> tuple[str, ...]:
    """The log as files: of three days, if it has as many rows."""
    head, *rows = log.splitlines(keepends=True)
    parts = [head + "".join(rows[a:b]) for a, b in ((0, 4), (4, 6), (6, 8))] if len(rows) == 8 else [log]
    paths = [folder / f"day_{i}.csv" for i in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(part, encoding=schema.encoding)
    return tuple(map(str, paths))


def pages() -> dict[pathlib.Path, str]:
    """Every page with something made, as it should be."""
    reference, schema = DOCS / "REFERENCE.md", DOCS / "SCHEMA.md"
    before, rest = reference.read_text().split("<!-- flags -->")
    after = rest.split("<!-- /flags -->")[1]
    return {
        DOCS / "FLAGS.md": flags_page(),
        reference: f"{before}<!-- flags -->\n{reference_table()}\n<!-- /flags -->{after}",
        schema: schema_page(schema.read_text()),
    }


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not current")
    check = parser.parse_args().check
    old = []
    for path, text in pages().items():
        if path.exists() and path.read_text() == text:
            continue
        old.append(path.name)
        if not check:
            path.write_text(text)
    if old:
        print(f"{', '.join(old)} {'is not current; run python docs/make_pages.py' if check else 'written'}")
    sys.exit(check and bool(old))


if __name__ == "__main__":
    main()
