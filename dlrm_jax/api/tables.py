"""A run's embedding tables by name, their rows by the values of the log; read from the checkpoint, piece by piece."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.api.exporting import pieces, rows_of
from dlrm_jax.api.frames import as_polars
from dlrm_jax.api.trained import Stored
from dlrm_jax.config import ConfigError, TableConfig, require
from dlrm_jax.data.read.raw_values import texts_of
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.serving.artifact.transform import Reader


class Table:
    """One table: V rows of D float32 numbers. `table["u42"]` is the row of a value, `table.rows()` all of them.

    Of values that shared one row in training (rare ones, those of a hash) each gives that row.
    """

    def __init__(self, run: Stored, config: TableConfig, reader: Callable[[], Reader]) -> None:
        self._run, self._config, self._reader = run, config, reader
        self.name, self.dim = config.name, config.embedding_dim

    def __len__(self) -> int:
        return self._config.num_embeddings

    def __repr__(self) -> str:
        return f"Table({self.name!r}, {len(self):,} rows of {self.dim})"

    def __getitem__(self, value: Any) -> np.ndarray:
        """(D,): the row of a value of the log. KeyError for one that training did not have."""
        return self.row(self.id_of(value))

    def __contains__(self, value: Any) -> bool:
        try:
            return self.id_of(value) >= 0
        except (KeyError, ValueError):
            return False

    def row(self, number: int) -> np.ndarray:
        """(D,): a row by its number. IndexError for one that there is not."""
        if not 0 <= number < len(self):
            raise IndexError(f"table {self.name!r} has rows 0 to {len(self) - 1:,}, not {number}")
        rows_1xD = rows_of(self._run, self.name, number, 1)
        return np.asarray(rows_1xD[0])

    def id_of(self, value: Any) -> int:
        """The row of a value of the log; of a cross, of a tuple of its columns'. KeyError for an unknown one."""
        features = [f for f in self._run.model.features if f.table == self.name and not f.parts]
        require(
            bool(features), f"table {self.name!r} is one of several that make a feature's vectors: ask for row(NUMBER)"
        )
        value = value.item() if isinstance(value, np.generic) else value
        bag = self._reader().ids(features[0].name, *(value if isinstance(value, tuple) else (value,)))
        if len(bag) != 1 or bag[0] < 0:
            raise KeyError(f"table {self.name!r} has no row for {value!r}: training did not have it")
        return int(bag[0])

    @functools.cached_property
    def values(self) -> list[str]:
        """What each row stands for: the log's values as text, (infrequent), or its number where none is known."""
        directory, schema = self._run.dataset.directory, self._run.dataset.schema
        numbers = np.arange(len(self))
        if directory is None or schema is None:
            return [str(number) for number in numbers]
        known = schema_from_dict(dict(schema))
        if self.name not in known.tables():
            return [str(number) for number in numbers]
        return texts_of(directory, known, self.name, numbers)

    def rows(self) -> np.ndarray:
        """(V, D) float32: all rows, in memory."""
        return np.concatenate(list(self.pieces()))

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows, some at a time: (rows, D) float32."""
        return pieces(self._run, self.name)

    def norms(self) -> np.ndarray:
        """(V,): the Euclidean length of each row."""
        return np.concatenate([np.linalg.norm(rows, axis=1) for rows in self.pieces()])

    def nearest(self, value: Any, count: int = 10) -> list[tuple[str, float]]:
        """The `count` other rows that point most nearly the way of a value's row, or of a vector: (value, cosine).

        Rows of zeros have no direction, and are none of them.
        """
        is_vector = isinstance(value, np.ndarray) and value.ndim == 1
        own = None if is_vector else self.id_of(value)
        wanted_D = np.asarray(value if own is None else self.row(own), np.float32)
        require(wanted_D.shape == (self.dim,), f"a vector of table {self.name!r} has {self.dim} numbers")
        require(count >= 1, f"count is {count}; it must be at least 1")
        length = np.linalg.norm(wanted_D)
        require(bool(length > 0), f"the row of {value!r:.80} is all zeros, so it has no direction")
        cosine_V = np.concatenate([_cosines(rows, wanted_D / length) for rows in self.pieces()])
        if own is not None:
            cosine_V[own] = -np.inf
        order = np.argsort(-cosine_V, kind="stable")[:count]
        return [(self.values[i], float(cosine_V[i])) for i in order if np.isfinite(cosine_V[i])]

    def to_arrow(self) -> pa.Table:
        """Columns `id`, `value` (text) and `vector` (a list of D float32)."""
        rows = self.rows()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), self.dim)
        return pa.table({"id": pa.array(np.arange(len(self))), "value": pa.array(self.values), "vector": vectors})

    def to_pandas(self) -> Any:
        """`to_arrow` as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """`to_arrow` as a polars DataFrame."""
        return as_polars(self.to_arrow())

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write `to_arrow` as .parquet, or the rows alone as .npy; the path. ConfigError for another ending."""
        path = pathlib.Path(path)
        if path.suffix == ".parquet":
            pq.write_table(self.to_arrow(), path)
        elif path.suffix == ".npy":
            np.save(path, self.rows(), allow_pickle=False)
        else:
            raise ConfigError(f"{path}: tables are saved as .parquet or .npy")
        return path


def _cosines(rows_VxD: np.ndarray, direction_D: np.ndarray) -> np.ndarray:
    norms_V = np.linalg.norm(rows_VxD, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine_V = rows_VxD @ direction_D / norms_V
    return np.where(norms_V > 0, cosine_V, -np.inf)


class Tables(Mapping[str, Table]):
    """A run's tables by name.

    >>> import dlrm_jax
    >>> tables = dlrm_jax.Run("runs/clicks").tables
    >>> tables["user"]["u3"].shape, len(tables["user"].nearest("u3", 2)), tables["user"].save("user.npy").name
    ((16,), 2, 'user.npy')
    """

    def __init__(self, run: Stored, reader: Callable[[], Reader]) -> None:
        self._tables = {table.name: Table(run, table, reader) for table in run.model.tables}

    def __getitem__(self, name: str) -> Table:
        if name not in self._tables:
            raise KeyError(f"there is no table {name!r}; there are {', '.join(self._tables)}")
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __repr__(self) -> str:
        return f"Tables({', '.join(map(repr, self._tables.values()))})"

    def save(self, directory: str | os.PathLike[str], kind: str = "parquet") -> list[pathlib.Path]:
        """Every table as DIRECTORY/NAME.parquet, or .npy; their paths. ConfigError for another `kind`."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        return [table.save(directory / f"{name.replace('/', '_')}.{kind}") for name, table in self._tables.items()]
