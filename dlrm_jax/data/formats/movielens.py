"""MovieLens 100k and 1M: did a user rate a film 4 or 5? The three files of a directory, joined into one table.

Reads `ml-100k.{inter,item,user}` (also ml-1m), `u.{data,item,user}`, or `{ratings,users,movies}.dat`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from dlrm_jax.config import ConfigError
from dlrm_jax.data.values.columns import to_integers

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""Genre flags of GroupLens' u.item, in its column order (u.genre)."""

_UNKNOWN_YEAR = 1980
"""A film without a release date enters the dense feature (year - 1980) / 20 as 0."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One way in which the files of ratings, users and items are given, each in this order.

    `headings`, of files with a header, are the names there of `columns`. `year` and `genres` make a film's of its row.
    """

    names: tuple[tuple[str, ...], ...]
    delimiters: tuple[str, str, str]
    columns: tuple[tuple[str, ...], ...]
    year: Callable[[dict[str, str]], str]
    genres: Callable[[dict[str, str]], Iterable[str]]
    headings: tuple[tuple[str, ...], ...] = ()
    encoding: str = "latin-1"


_RATINGS = ("user", "item", "rating", "timestamp")
_LAYOUTS = (
    _Layout(  # MovieLens 1M: a film's year ends its title in brackets.
        names=(("ratings.dat",), ("users.dat",), ("movies.dat",)),
        delimiters=("::", "::", "::"),
        columns=(_RATINGS, ("id", "gender", "age", "occupation", "zip"), ("id", "title", "genres")),
        year=lambda film: film["title"].rstrip()[-5:-1],
        genres=lambda film: film["genres"].split("|"),
    ),
    _Layout(  # GroupLens' own files of 100k.
        names=(("u.data",), ("u.user",), ("u.item",)),
        delimiters=("\t", "|", "|"),
        columns=(
            _RATINGS,
            ("id", "age", "gender", "occupation", "zip"),
            ("id", "title", "date", "video_date", "url", *GENRES),
        ),
        year=lambda film: film["date"][-4:],
        genres=lambda film: (genre for genre in GENRES if film[genre] == "1"),
    ),
    _Layout(  # RecBole's atomic files, whose header is `name:type`.
        names=tuple((f"ml-100k.{kind}", f"ml-1m.{kind}") for kind in ("inter", "user", "item")),
        delimiters=("\t", "\t", "\t"),
        columns=(_RATINGS, ("id", "age", "gender", "occupation", "zip"), ("id", "year", "genres")),
        headings=(
            ("user_id", "item_id", "rating", "timestamp"),
            ("user_id", "age", "gender", "occupation", "zip_code"),
            ("item_id", "release_year", "class"),
        ),
        year=lambda film: film["year"],
        genres=lambda film: film["genres"].split(),
        encoding="utf8",
    ),
)


def find_files(directory: str) -> tuple[str, ...]:
    """The files of ratings, users and items in a directory; ConfigError naming what is missing."""
    return tuple(map(str, _find(directory)[1]))


def read_table(directory: str, by_time: bool) -> tuple[pa.Table, np.ndarray]:
    """(the joined log, each row's number in the file of ratings); ConfigError for what cannot be read.

    Rows come in the fixed order of `numpy.random.default_rng(0).permutation`, or by time (ties as in the file).
    Dense columns are age / 50, (year - 1980) / 20, time from 0 to 1, hour of the day / 24.
    """
    layout, paths = _find(directory)
    ratings, users, items = (_File(layout, kind, path) for kind, path in enumerate(paths))
    user_R = _index(ratings.numbers("user"), users.numbers("id"), "user")
    item_R = _index(ratings.numbers("item"), items.numbers("id"), "item")
    time_R = ratings.numbers("timestamp")
    films = items.table.to_pylist()
    years = [layout.year(film) for film in films]
    year_I = np.array([int(year) if year.isdecimal() else _UNKNOWN_YEAR for year in years])
    genres_I = pa.array([sorted(layout.genres(film)) for film in films], pa.list_(pa.string()))
    zip_U = pc.utf8_slice_codeunits(users.table["zip"], 0, 3)
    columns = {
        "user": users.numbers("id")[user_R],
        "item": items.numbers("id")[item_R],
        "gender": users.table["gender"].take(pa.array(user_R)),
        "occupation": users.table["occupation"].take(pa.array(user_R)),
        "zip": zip_U.take(pa.array(user_R)),
        "genres": genres_I.take(pa.array(item_R)),
        "age": users.numbers("age")[user_R] / 50,
        "year": (year_I[item_R] - _UNKNOWN_YEAR) / 20,
        "time": (time_R - time_R.min()) / max(int(time_R.max() - time_R.min()), 1),
        "hour": (time_R // 3600 % 24) / 24,
        "timestamp": time_R,
        "label": (ratings.numbers("rating") >= 4).astype(np.float32),
    }
    order_R = np.argsort(time_R, kind="stable") if by_time else np.random.default_rng(0).permutation(len(time_R))
    return pa.table(columns).take(pa.array(order_R)), order_R


def _find(directory: str) -> tuple[_Layout, list[pathlib.Path]]:
    """How the files are given, and where each lies."""
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise ConfigError(f"{directory} is not a directory; it must hold MovieLens' files")
    layout = next((layout for layout in _LAYOUTS if (folder / layout.names[0][0]).is_file()), _LAYOUTS[-1])
    paths = []
    for names in layout.names:
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise ConfigError(f"{directory} holds none of {', '.join(names)}, which MovieLens' log needs")
        paths.append(found)
    return layout, paths


class _File:
    """One of the files, its columns texts under the names of its layout."""

    def __init__(self, layout: _Layout, kind: int, path: pathlib.Path) -> None:
        self._path, self._first_line = path, 2 if layout.headings else 1
        columns = layout.columns[kind]
        if not layout.headings:
            self.table = _parse(path, layout.delimiters[kind], columns, layout.encoding)
            return
        table = _parse(path, layout.delimiters[kind], None, layout.encoding)
        named = table.rename_columns([name.split(":")[0] for name in table.column_names])
        for heading in layout.headings[kind]:
            if heading not in named.column_names:
                raise ConfigError(f"{path}: no column {heading!r} in the header {', '.join(named.column_names)}")
        self.table = named.select(list(layout.headings[kind])).rename_columns(list(columns))

    def numbers(self, column: str) -> np.ndarray:
        """A column as int64; ConfigError naming line and value of the first that is no whole number."""
        texts = self.table[column].combine_chunks()
        values, wrong = to_integers(texts, "int")
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ConfigError(
                f"{self._path}, line {self._first_line + row}, column {column}: {texts[row].as_py()!r} is not a whole "
                "number of 64 bits"
            )
        return values


def _parse(path: pathlib.Path, delimiter: str, columns: tuple[str, ...] | None, encoding: str) -> pa.Table:
    """All columns as texts. `columns` names those of a file without a header; None takes the first line as header."""
    data = path.read_bytes()
    if len(delimiter) > 1:  # One character separates fields for the parser; it cannot stand in latin-1 text.
        data, delimiter = data.replace(delimiter.encode(), b"\x1f"), "\x1f"
    if not data:
        raise ConfigError(f"{path} is empty")
    refusals: list[str] = []

    def refuse(row: csv.InvalidRow) -> str:
        # pyarrow swallows what its handler raises, so the reason is kept for afterwards.
        refusals.append(f"{path}: line {row.number} has {row.actual_columns} columns; expected {row.expected_columns}")
        return "error"

    names = columns or data.split(b"\n", 1)[0].decode(encoding, "replace").rstrip("\r").split(delimiter)
    try:
        return csv.read_csv(
            pa.BufferReader(data),
            # One thread keeps line numbers, which pyarrow gives up otherwise.
            csv.ReadOptions(column_names=list(columns or ()), encoding=encoding, use_threads=False, block_size=2**24),
            csv.ParseOptions(delimiter=delimiter, quote_char=False, invalid_row_handler=refuse),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise ConfigError(refusals[0] if refusals else f"{path}: {str(error).splitlines()[0]}") from error


def _index(values_R: np.ndarray, known: np.ndarray, what: str) -> np.ndarray:
    """Position of each value among `known`; ConfigError for one that is not there."""
    positions = pc.index_in(pa.array(values_R), value_set=pa.array(known))
    if positions.null_count:
        row = int(np.flatnonzero(positions.is_null())[0])
        raise ConfigError(f"rating {row} names {what} {values_R[row]}, which the {what} file does not have")
    return positions.to_numpy()
