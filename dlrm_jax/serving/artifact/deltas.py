"""A delta: what a version has other than the version that it changes, its parent (store.py).

weights/              all weights that are no table's, under the parent's names
tables/NAME.rows.npy, tables/NAME.changed.npy     which rows of a table changed, rising; what they are now, as stored
vocabularies/NAME.more.npy                        what comes behind the keys that there were
signature.json, self_check.npz, metrics.json      as every version has them, of the model that comes of it

Whatever is not here is the parent's: program, model.json, rows that did not change. Here a delta is read to change a
model that is in memory; where a version is read from its files, its deltas are laid over it (weights.ArrayFile).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dlrm_jax.config import differences, require, tell
from dlrm_jax.serving.artifact.signature import Signature
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.weights import ROWS, ArrayFile, Changed, Stored, ending, read_index, require_known_files

_HEADER_BYTES = 4
"""Scale and bias of a packed row (quantise.py), at its end."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a version's arrays are stored: what its deltas are checked against, whatever became of its files since."""

    index: Mapping[str, Stored]
    files: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    """(shape, type) of each file."""

    def offsets(self, name: str) -> dict[str, int]:
        """The first row of each of an array's tables in it."""
        stored, first, found = self.index[name], 0, {}
        for table, file in zip(stored.tables, stored.files, strict=True):
            found[table] = first
            first += self.files[file][0][0]
        return found


def read_layout(version: Version) -> Layout:
    """The layout of a version."""
    index = read_index(version)
    files = {file: ArrayFile(version, file, stored.dtype) for stored in index.values() for file in stored.files}
    return Layout(index, {name: (file.shape, file.dtype) for name, file in files.items()})


@dataclasses.dataclass(frozen=True)
class Delta:
    """What becomes of weights: all that are no table's, by name; and by table (row_M, rising, rows as stored)."""

    dense: dict[str, np.ndarray]
    rows: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def num_rows(self) -> int:
        """Of all tables."""
        return sum(len(row_M) for row_M, _ in self.rows.values())


class Change:
    """What an engine makes ready beside the batches that it scores: `apply` is done between two of them, `undo` too."""

    def __init__(self, apply: Callable[[], None], undo: Callable[[], None]) -> None:
        self.apply, self.undo = apply, undo


def read_delta(version: Version, layout: Layout) -> Delta:
    """A delta that was opened by itself, in memory; ConfigError where it does not fit `layout`, or is not finite."""
    require_known_files(version, layout.index)
    dense, rows = {}, {}
    for name, stored in layout.index.items():
        if not stored.tables:
            (file,) = stored.files
            dense[name] = ArrayFile(version, file, stored.dtype).whole()
            shape = layout.files[file][0]
            fits = dense[name].shape == shape
            require(fits, f"{version.directory}: {name} has {list(dense[name].shape)} numbers, not {list(shape)}")
            _require_finite(version, name, dense[name])
        for table, file in zip(stored.tables, stored.files, strict=False):
            if version.owns(ending(file, ROWS)):
                changed = Changed(version, file, *layout.files[file])
                rows[table] = changed.row_M, changed.values.rows(0, len(changed.row_M))
                _require_finite(version, f"table {table!r}", rows[table][1])
    return Delta(dense, rows)


def _require_finite(version: Version, name: str, values: np.ndarray) -> None:
    if values.dtype == np.uint8:
        headers = np.ascontiguousarray(values[:, -_HEADER_BYTES:])
        values = headers.view(ml_dtypes.bfloat16)
    finite = bool(np.isfinite(values.astype(np.float32, copy=False)).all())
    require(finite, f"{version.directory}: {name} holds NaN or infinity; export a whole version")


def require_same_inputs(signature: Signature, before: Signature, where: Any) -> None:
    """ConfigError where a delta's model takes other inputs than the one it changes, or fewer ids."""
    changed = differences(signature.interface(), before.interface())
    require(not changed, f"{where}: its schema differs (new != present): {tell(changed)}")
    kinds = (signature.kind, signature.embedding_dim), (before.kind, before.embedding_dim)
    require(kinds[0] == kinds[1], f"{where} has tables of {kinds[0]}, its parent of {kinds[1]}; export a whole version")
    for feature, then in zip(signature.features, before.features, strict=True):
        fits = (feature.table, feature.pooling) == (then.table, then.pooling) and feature.rows >= then.rows
        fits &= signature.stored_rows(feature) == before.stored_rows(then)
        require(fits, f"{where}: feature {feature.name!r} reads another table than before, or a smaller one")
