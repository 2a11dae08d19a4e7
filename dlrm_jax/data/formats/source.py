"""What every reader of a log gives: chunks of rows that a worker thread turns into columns."""

import dataclasses
import glob
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import pyarrow as pa

from dlrm_jax.config import ConfigError

_LONGEST_PATH = 4096


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `row` counts the chunk's rows from 0; `line` the file's lines from 1, if known."""

    row: int
    line: int | None
    reason: str
    column: str = ""
    value: str | None = None
    unit: str = "line"

    def describe(self, path: str) -> str:
        """File, line, column, value and reason, in one line."""
        where = path + (f", {self.unit} {self.line}" if self.line is not None else f", row {self.row} of its part")
        where += f", column {self.column}" if self.column else ""
        value = "" if self.value is None else f"{self.value[:80]!r} "
        return f"{where}: {value}{self.reason}"


@dataclasses.dataclass(frozen=True)
class Columns:
    """A chunk's rows: `arrays` by column name; `num_rows` counts the bad ones too, `row_R` numbers those that are left.

    `line_of` tells the line of a row (numbered as in `row_R`), for error texts; it may be slow. `names`, where rows and
    not the file's head name the columns, are names that some row has: all that were asked for, and some others.
    """

    arrays: dict[str, pa.Array]
    row_R: Any
    num_rows: int
    bad: list[BadRow]
    line_of: Callable[[int], int | None]
    unit: str = "line"
    names: frozenset[str] | None = None


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a chunk begins: file, offset within (bytes of its text, or rows), and the line there, from 1."""

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows not yet parsed. `next` is where the following chunk begins; `done` the log's bytes read so far."""

    file: int
    next: Position
    done: int
    parse: Callable[[], Columns]


class Source(Protocol):
    """A log: files that are read from any position on."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The log's files."""

    @property
    def num_bytes(self) -> int:
        """Their size."""

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """Chunks from `start` on; their borders depend on the files alone."""


def expand(patterns: str, what: str = "--input") -> tuple[str, ...]:
    """The files that comma-separated globs name, each pattern's in natural order (day_2 before day_10).

    What is there is named by its name, whatever that holds: a comma, `[1]`, `*`.
    """
    paths: list[str] = []
    parts = [patterns] if os.path.exists(patterns) else patterns.split(",")
    while parts:
        pattern = name = parts.pop(0)
        found = _matching(name)
        for count, further in enumerate(parts if pattern and not found else (), start=1):
            name += f",{further}"
            if len(name) > _LONGEST_PATH:
                break
            found = _matching(name)
            if found:
                del parts[:count]
                break
        if pattern and not found:
            raise ConfigError(f"{what}={pattern} matches no file")
        paths += found
    if not paths:
        raise ConfigError(f"{what} is missing; it names the log's files")
    return tuple(dict.fromkeys(paths))


def _matching(name: str) -> list[str]:
    """The file of that name, else those that it matches as a glob; of that the directory that is there is no part."""
    if os.path.exists(name) or not glob.has_magic(name):
        return [name] if os.path.exists(name) else []
    there = os.path.dirname(name)
    while there and not os.path.isdir(there):
        there = os.path.dirname(there)
    return sorted(glob.glob(glob.escape(there) + name[len(there) :], recursive=True), key=_natural)


def _natural(path: str) -> list[Any]:
    parts: list[Any] = [""]
    for character in path:
        if character.isdecimal() == parts[-1].isdecimal():
            parts[-1] += character
        else:
            parts.append(character)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def require_columns(path: str, names: list[str], needed: list[str]) -> None:
    """ConfigError naming the first needed column that a file lacks, or has twice."""
    for name in needed:
        if name not in names:
            raise ConfigError(f"{path} has no column {name!r}; it has {list_names(names)}")
        if names.count(name) > 1:
            raise ConfigError(f"{path} has two columns {name!r}; name them apart")


def list_names(names: list[str]) -> str:
    """Column names for an error text: one line, not too long."""
    return " ".join(", ".join(names[:40]).split())[:500] + (", ..." if len(names) > 40 else "")


def refuse(path: str, error: Exception) -> NoReturn:
    """Raise what a library said of a file, as one line."""
    raise ConfigError(f"{path}: {' '.join(str(error).split())[:300]}") from error
