"""MovieLens 100k and 1M: did a user rate a film 4 or 5?

Reads `ml-100k.{inter,item,user}` (also ml-1m), `u.{data,item,user}`, or `{ratings,users,movies}.dat`.
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.config import ConfigError, FeatureConfig
from dlrm_jax.data.batch import pack_bags
from dlrm_jax.data.formats import text
from dlrm_jax.data.read.dataset import Dataset, Split

_GENRES = [
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
]
"""Genre flags of GroupLens' u.item, in its column order (u.genre)."""

_UNKNOWN_YEAR = 1980
"""A film without a release date enters the dense feature (year - 1980) / 20 as 0."""


@dataclasses.dataclass(frozen=True)
class _Log:
    """The three files, joined: `user_R` and `item_R` are positions among `users` and `items`."""

    user_R: np.ndarray
    item_R: np.ndarray
    users: dict
    items: dict
    timestamp_R: np.ndarray
    label_R: np.ndarray

    def dense(self) -> dict[str, np.ndarray]:
        """The dense features: age / 50, (year - 1980) / 20, time from 0 to 1, hour of the day / 24."""
        start, span = self.timestamp_R.min(), max(int(self.timestamp_R.max() - self.timestamp_R.min()), 1)
        return {
            "age": self.users["age"].astype(np.float64)[self.user_R] / 50,
            "year": (self.items["year"][self.item_R] - 1980) / 20,
            "time": (self.timestamp_R - start) / span,
            "hour": (self.timestamp_R // 3600 % 24) / 24,
        }


def _read_log(data_dir: str) -> _Log:
    directory = pathlib.Path(data_dir)
    if not directory.is_dir():
        raise ConfigError(f"{data_dir} is not a directory; it must hold MovieLens' files")
    if (directory / "ratings.dat").is_file():
        ratings, users, items = _read_one_million(directory)
    elif (directory / "u.data").is_file():
        ratings, users, items = _read_grouplens(directory)
    else:
        ratings, users, items = _read_atomic(directory)
    return _Log(
        user_R=_index(ratings["user"], users["id"], "user"),
        item_R=_index(ratings["item"], items["id"], "item"),
        users=users,
        items=items,
        timestamp_R=ratings["timestamp"].astype(np.int64),
        label_R=(ratings["rating"].astype(np.int64) >= 4).astype(np.float32),
    )


def read(data_dir: str, split: str) -> Dataset:
    """The data set of a directory, split at `random` (80/10/10 of a fixed permutation) or by `time`."""
    log = _read_log(data_dir)
    columns = {"user": (log.user_R, len(log.users["id"])), "item": (log.item_R, len(log.items["id"]))}
    for name in ("gender", "occupation", "zip"):
        ids, size = _vocabulary(log.users[name])
        columns[name] = (ids[log.user_R], size)
    genres_IxH, num_genres = _genre_bags(log.items["genres"])
    dense = log.dense()
    dense_RxN = np.stack(list(dense.values()), axis=1).astype(np.float32)
    ids_RxK = np.concatenate([ids[:, None] for ids, _ in columns.values()] + [genres_IxH[log.item_R]], axis=1)
    hot = FeatureConfig("genres", "genres", hotness=genres_IxH.shape[1])
    return Dataset(
        name=f"movielens_100k/{split}",
        dense_names=tuple(dense),
        features=(*(FeatureConfig(name, name) for name in columns), hot),
        table_sizes={**{name: size for name, (_, size) in columns.items()}, "genres": num_genres},
        splits=_split(split, log.timestamp_R, dense_RxN, ids_RxK.astype(np.int32), log.label_R),
    )


def read_table(data_dir: str) -> pa.Table:
    """The joined log as a table, for preparation; `split` is the random one of `read`."""
    log = _read_log(data_dir)
    num_rows = len(log.label_R)
    codes_R = np.empty(num_rows, np.int64)
    order = np.random.default_rng(0).permutation(num_rows)
    codes_R[order] = np.searchsorted(_bounds(num_rows), np.arange(num_rows), side="right")
    columns: dict = {
        "user": log.users["id"][log.user_R],
        "item": log.items["id"][log.item_R],
        **{name: pa.array(log.users[name]).take(pa.array(log.user_R)) for name in ("gender", "occupation", "zip")},
        "genres": pa.array(log.items["genres"], pa.list_(pa.string())).take(pa.array(log.item_R)),
        **log.dense(),
        "timestamp": log.timestamp_R,
        "split": pa.array(["train", "val", "test"]).take(pa.array(codes_R)),
        "label": log.label_R,
    }
    return pa.table(columns)


def _split(
    rule: str, timestamp_R: np.ndarray, dense_RxN: np.ndarray, ids_RxK: np.ndarray, label_R: np.ndarray
) -> dict[str, Split]:
    """80/10/10 in the order of `numpy.random.default_rng(0).permutation`, or of time (ties in file order)."""
    num_rows = len(label_R)
    if rule == "random":
        order = np.random.default_rng(0).permutation(num_rows)
    else:
        order = np.argsort(timestamp_R, kind="stable")
    first, second = _bounds(num_rows)
    parts = {"train": order[:first], "val": order[first:second], "test": order[second:]}
    return {name: Split(dense_RxN[rows], ids_RxK[rows], label_R[rows], rows) for name, rows in parts.items()}


def _bounds(num_rows: int) -> tuple[int, int]:
    return int(0.8 * num_rows), int(0.9 * num_rows)


def _read_atomic(directory: pathlib.Path) -> tuple[dict, dict, dict]:
    """RecBole's atomic files: tab separated, header `name:type`."""
    paths = {
        kind: text.find_file(str(directory), (f"ml-100k.{kind}", f"ml-1m.{kind}")) for kind in ("inter", "user", "item")
    }
    tables = {}
    for kind, path in paths.items():
        table = text.read_strings(path, "\t")
        tables[kind] = (path, table.rename_columns([name.split(":")[0] for name in table.column_names]))
    ratings = _numbers(tables["inter"], 2, user="user_id", item="item_id", rating="rating", timestamp="timestamp")
    path, user_table = tables["user"]
    users = _numbers(tables["user"], 2, id="user_id", age="age") | _strings(
        path, user_table, gender="gender", occupation="occupation", zip="zip_code"
    )
    path, item_table = tables["item"]
    items = _numbers(tables["item"], 2, id="item_id") | _strings(path, item_table, year="release_year", genres="class")
    items["year"] = _years(items["year"])
    items["genres"] = [genres.split() for genres in items["genres"]]
    users["zip"] = _zip_prefix(users["zip"])
    return ratings, users, items


def _read_grouplens(directory: pathlib.Path) -> tuple[dict, dict, dict]:
    """GroupLens' own files: u.data tab separated; u.user and u.item separated by `|`, in latin-1; no headers."""
    columns = {
        "u.data": ("\t", ("user", "item", "rating", "timestamp")),
        "u.user": ("|", ("id", "age", "gender", "occupation", "zip")),
        "u.item": ("|", ("id", "title", "date", "video_date", "url", *_GENRES)),
    }
    tables = {}
    for name, (delimiter, names) in columns.items():
        path = text.find_file(str(directory), (name,))
        tables[name] = (path, text.read_strings(path, delimiter, names, encoding="latin-1"))
    ratings = _numbers(tables["u.data"], 1, user="user", item="item", rating="rating", timestamp="timestamp")
    users = _numbers(tables["u.user"], 1, id="id", age="age") | _strings(
        *tables["u.user"], gender="gender", occupation="occupation", zip="zip"
    )
    path, item_table = tables["u.item"]
    items = _numbers(tables["u.item"], 1, id="id") | _strings(path, item_table, year="date")
    items["year"] = _years([date[-4:] for date in items["year"]])
    flags_IxG = np.stack([np.asarray(item_table[genre].to_pylist()) == "1" for genre in _GENRES], axis=1)
    items["genres"] = [[genre for genre, flag in zip(_GENRES, flags, strict=True) if flag] for flags in flags_IxG]
    users["zip"] = _zip_prefix(users["zip"])
    return ratings, users, items


def _read_one_million(directory: pathlib.Path) -> tuple[dict, dict, dict]:
    """MovieLens 1M: fields separated by `::`, in latin-1, no headers; a film's year ends its title in brackets."""
    columns = {
        "ratings.dat": ("user", "item", "rating", "timestamp"),
        "users.dat": ("id", "gender", "age", "occupation", "zip"),
        "movies.dat": ("id", "title", "genres"),
    }
    tables = {}
    for name, names in columns.items():
        path = text.find_file(str(directory), (name,))
        # One character separates fields for the parser; it cannot stand in latin-1 text.
        data = path.read_bytes().replace(b"::", b"\x1f")
        tables[name] = (path, text.parse_strings(path, data, "\x1f", names, encoding="latin-1"))
    ratings = _numbers(tables["ratings.dat"], 1, user="user", item="item", rating="rating", timestamp="timestamp")
    users = _numbers(tables["users.dat"], 1, id="id", age="age") | _strings(
        *tables["users.dat"], gender="gender", occupation="occupation", zip="zip"
    )
    items = _numbers(tables["movies.dat"], 1, id="id") | _strings(*tables["movies.dat"], title="title", genres="genres")
    items["year"] = _years([title.rstrip()[-5:-1] for title in items.pop("title")])
    items["genres"] = [genres.split("|") for genres in items["genres"]]
    users["zip"] = _zip_prefix(users["zip"])
    return ratings, users, items


def _numbers(source: tuple[pathlib.Path, pa.Table], first_line: int, **names: str) -> dict[str, np.ndarray]:
    path, table = source
    return {
        key: text.to_integers(path, name, _column(path, table, name), first_line).to_numpy()
        for key, name in names.items()
    }


def _strings(path: pathlib.Path, table: pa.Table, **names: str) -> dict:
    return {key: _column(path, table, name).to_pylist() for key, name in names.items()}


def _column(path: pathlib.Path, table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise ConfigError(f"{path}: no column {name!r} in the header {', '.join(table.column_names)}")
    return table[name]


def _years(values: list[str]) -> np.ndarray:
    return np.array([int(value) if value.isdecimal() else _UNKNOWN_YEAR for value in values])


def _zip_prefix(codes: list[str]) -> list[str]:
    return [code[:3] for code in codes]


def _index(values: np.ndarray, known: np.ndarray, what: str) -> np.ndarray:
    """Position of each value among `known`; ConfigError for one that is not there."""
    positions = pc.index_in(pa.array(values), value_set=pa.array(known)).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(np.isnan(positions.astype(np.float64)))
    if len(bad):
        raise ConfigError(f"rating {bad[0]} names {what} {values[bad[0]]}, which the {what} file does not have")
    return positions.astype(np.int32)


def _vocabulary(values: list[str]) -> tuple[np.ndarray, int]:
    """Ids in alphabetical order, and how many."""
    names, ids = np.unique(np.asarray(values), return_inverse=True)
    return ids.astype(np.int32), len(names)


def _genre_bags(genres: list[list[str]]) -> tuple[np.ndarray, int]:
    """(items, most genres of an item) ids of each item's genres in alphabetical order, and the number of genres."""
    names = sorted({name for bag in genres for name in bag})
    id_of = {name: i for i, name in enumerate(names)}
    lengths = np.array([len(bag) for bag in genres])
    values = np.array([id_of[name] for bag in genres for name in sorted(bag)], np.int32)
    return pack_bags("genres", values, lengths, max(1, int(lengths.max()))), max(1, len(names))
