"""An exported model as a value: it needs nothing of the training run."""

import os
import pathlib
from typing import Any

import numpy as np

from dlrm_jax.api.frames import as_arrow, columns_of
from dlrm_jax.serving.artifact.loaded import Servable
from dlrm_jax.serving.artifact.loaded import load as load_servable


class Model:
    """A version of an exported model, the newest by default; every file is checked.

    >>> import dlrm_jax
    >>> model = dlrm_jax.load("models/clicks")
    >>> model.columns, model.predict([{"price": 3, "user": "u1"}]).shape
    (('price', 'user'), (1,))
    """

    def __init__(self, model_dir: str | os.PathLike[str], version: int | None = None) -> None:
        """ConfigError where there is no whole version."""
        self.servable: Servable = load_servable(pathlib.Path(model_dir), version)
        """What serves it: arrays of ids and numbers to scores (serving/artifact/loaded.py)."""
        self.directory = pathlib.Path(model_dir)

    def __repr__(self) -> str:
        return f"Model({str(self.directory)!r}, version={self.version})"

    @property
    def version(self) -> int:
        """The version's number."""
        return self.servable.version.number

    @property
    def metrics(self) -> dict[str, Any]:
        """What it reached when it was exported, by split."""
        return self.servable.metrics

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a table of raw rows must have."""
        return self.servable.reader.columns

    def predict(self, table: Any) -> np.ndarray:
        """The probability of a click of each row, float32, of a table of raw rows (as Run.predict takes it).

        ConfigError for a column that is missing; BadRequest, a ValueError, names row and column of a wrong value.
        """
        rows = table if isinstance(table, list) else columns_of(as_arrow(table), self.columns)
        return self.servable.predict_rows(rows)
