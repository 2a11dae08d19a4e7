"""The arrays of an exported version, read from their files into memory: nothing that is served stays mapped.

So a file that is changed or cut later changes no score, and ends no process.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dlrm_jax.config import ConfigError, ModelConfig, model_from_dict, require
from dlrm_jax.serving.artifact import signature as signatures
from dlrm_jax.serving.artifact.signature import ServedFeature, Signature
from dlrm_jax.serving.artifact.store import Version, open_regular
from dlrm_jax.tables.pooling import POOLING_WEIGHTS

_PIECE_BYTES = 1 << 26
"""What is read of a table's files at a time."""
ROWS, CHANGED, MORE = ".rows.npy", ".changed.npy", ".more.npy"
"""Endings of the files of a delta, in place of .npy: which rows of a table changed, and to what; what is appended."""
WHOLE_FILES = ("signature.json", "self_check.npz", "metrics.json")
"""Files that a delta has as every version has them."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of `weights.json`: the rows of its files, one below the other; `tables` are theirs, if any."""

    dtype: str
    files: list[str]
    tables: list[str] = dataclasses.field(default_factory=list)


def read_index(version: Version) -> dict[str, Stored]:
    """The arrays of a version by name."""
    try:
        index = {str(name): Stored(**facts) for name, facts in version.read_json("weights.json").items()}
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{version.directory}/weights.json does not name arrays: {error}; export anew") from error
    for name, stored in index.items():
        lists = isinstance(stored.files, list) and isinstance(stored.tables, list) and bool(stored.files)
        whole = lists and all(isinstance(text, str) for text in (*stored.files, *stored.tables, stored.dtype))
        fits = whole and len(stored.tables) in (0, len(stored.files))
        require(fits, f"{version.directory}/weights.json: array {name!r} is not described; export anew")
    for delta in version.chain[1:]:
        require_known_files(delta, index)
    return index


def ending(file: str, with_: str) -> str:
    """The name of a delta's file beside that of a whole version."""
    return file.removesuffix(".npy") + with_


def require_known_files(delta: Version, index: Mapping[str, Stored]) -> None:
    """ConfigError where a delta lacks a weight that is no table's, or has a file that nothing is read of."""
    dense = {file for stored in index.values() if not stored.tables for file in stored.files}
    tables = [file for stored in index.values() if stored.tables for file in stored.files]
    known = {*WHOLE_FILES, *dense, *(ending(file, with_) for file in tables for with_ in (ROWS, CHANGED))}
    files = delta.manifest.get("files")
    if files is None:  # It is being written.
        return
    missing = [file for file in (*WHOLE_FILES, *sorted(dense)) if not delta.owns(file)]
    require(not missing, f"{delta.directory} lacks {' '.join(missing[:1])}; export a whole version")
    more = [file for file in files if file not in known]
    more = [file for file in more if not (file.startswith("vocabularies/") and file.endswith(MORE))]
    require(not more, f"{delta.directory} has {' '.join(more[:1])}, which its parent does not; export a whole version")


class ArrayFile:
    """A .npy file of a version: its shape and type at once, its rows, as deltas left them, when they are asked for."""

    def __init__(self, version: Version, file: str, dtype: str) -> None:
        """ConfigError for a file of another type than `dtype`, or of another length than its header says."""
        self._path = version.path(file)
        try:
            with open_regular(self._path) as opened:
                read = np.lib.format.read_array_header_1_0
                if np.lib.format.read_magic(opened) != (1, 0):
                    read = np.lib.format.read_array_header_2_0
                self.shape, fortran_order, found = read(opened)
                self._start = opened.tell()
                opened.seek(0, 2)
                length = opened.tell()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._path} is not an array: {' '.join(str(error).split())}; export anew") from error
        self.dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" and found == np.uint16 else found
        require(self.dtype.name == dtype, f"{self._path} holds {found.name}, not {dtype}; export anew")
        whole = not (fortran_order and len(self.shape) > 1) and min(self.shape, default=0) >= 0
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=object)) if whole else 0
        whole = whole and length == self._start + (self.shape or (1,))[0] * self._row_bytes
        require(whole, f"{self._path} is not as long as its {list(self.shape)} numbers; export anew")
        deltas = [delta for delta in version.chain[1:] if delta.owns(ending(file, ROWS))]
        self._changes = [Changed(delta, file, self.shape, self.dtype) for delta in deltas]

    def rows(self, start: int, stop: int, step: int = 1) -> np.ndarray:
        """Rows start, start + step, ... below `stop`."""
        out = np.empty((len(range(start, stop, step)), *self.shape[1:]), self.dtype)
        if step == 1:
            self.read_into(out, start)
            return out
        piece = max(1, _PIECE_BYTES // max(1, self._row_bytes * step))
        for first in range(0, len(out), piece):
            part = out[first : first + piece]
            begin = start + first * step
            part[...] = self.rows(begin, begin + (len(part) - 1) * step + 1)[::step]
        return out

    def whole(self) -> np.ndarray:
        """All of it, also of one that is a single number and has no rows."""
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fill `out`, which lies in one piece, with the rows from `start` on."""
        with open_regular(self._path) as opened:
            opened.seek(self._start + start * self._row_bytes)
            count = opened.readinto(out.reshape(-1).view(np.uint8))
        require(count == out.nbytes, f"{self._path} was cut while it was read; export anew")
        for changed in self._changes:
            low, high = np.searchsorted(changed.row_M, (start, start + len(out)))
            if low < high:
                out[changed.row_M[low:high] - start] = changed.values.rows(low, high)


class Changed:
    """Rows of the table `file` that a delta changes: `row_M`, rising, and what they become, read when it is asked for.

    ConfigError where they are none of a table of that shape and type.
    """

    def __init__(self, delta: Version, file: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.row_M = ArrayFile(delta, ending(file, ROWS), "int32").whole()
        self.values = ArrayFile(delta, ending(file, CHANGED), dtype.name)
        row_M, path = self.row_M, delta.directory / ending(file, ROWS)
        rising = row_M.ndim == 1 and len(row_M) > 0 and row_M[0] >= 0 and bool((np.diff(row_M) > 0).all())
        require(rising, f"{path} are no rows in rising order; export a whole version")
        require(row_M[-1] < shape[0], f"{path}: row {row_M[-1]} is outside its table of {shape[0]} rows; export anew")
        fits = self.values.shape == (len(row_M), *shape[1:])
        require(fits, f"{path}: its rows have {list(self.values.shape)} numbers, not {[len(row_M), *shape[1:]]}")


def read_weights(version: Version) -> dict[str, jax.Array]:
    """All arrays of `weights.json` on the first device; large ones go there piece by piece."""
    weights = {}
    for name, stored in read_index(version).items():
        files = [ArrayFile(version, file, stored.dtype) for file in stored.files]
        if len(files) == 1 and not files[0].shape:
            weights[name] = jax.device_put(files[0].whole())
            continue
        require(all(file.shape for file in files), f"{version.directory}: array {name!r} has no rows; export anew")
        rows, row_shape = sum(file.shape[0] for file in files), files[0].shape[1:]
        piece = max(1, _PIECE_BYTES // max(1, files[0].dtype.itemsize * int(np.prod(row_shape))))
        if rows <= piece:
            weights[name] = jax.device_put(_rows_of(files, 0, rows))
            continue
        array = jnp.zeros((rows, *row_shape), files[0].dtype)
        for start in range(0, rows, piece):
            start = min(start, rows - piece)  # The last piece is as long as the others: they share a program.
            # One at a time, or all that are waiting would be in memory.
            array = jax.block_until_ready(_put(array, _rows_of(files, start, piece), start))
        weights[name] = array
    return weights


def _rows_of(files: list[ArrayFile], start: int, count: int) -> np.ndarray:
    """Rows of an array whose files lie one below the other."""
    parts, first = [], 0
    for file in files:
        begin, end = max(0, start - first), min(file.shape[0], start + count - first)
        if begin < end:
            parts.append(file.rows(begin, end))
        first += file.shape[0]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, piece, start, axis=0)


def read_model(version: Version) -> tuple[ModelConfig, float]:
    """The model's configuration, and the threshold of its probabilities; ConfigError where the signature differs."""
    require(
        version.has("model.json"),
        f"{version.directory} has no model.json, which --mesh and native kernels need; export it anew",
    )
    values = version.read_json("model.json")
    try:
        model, threshold = model_from_dict(values["model"]), float(values["loss_threshold"])
        # Of what type tables were in training is nobody's business here: the signature says how they are stored.
        tables = tuple(dataclasses.replace(table, dtype="float32") for table in model.tables)
        model = dataclasses.replace(model, tables=tables)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{version.directory}/model.json is not a model's: {error}; export anew") from error
    signature = signatures.from_dict(version.read_json("signature.json"))
    features = tuple(ServedFeature(f.name, f.table, f.hotness, f.pooling, model.num_ids(f)) for f in model.features)
    stored = tuple(dataclasses.replace(f, rows=signature.stored_rows(f)) for f in signature.features)
    sizes = (model.num_dense, model.embedding_dim, features)
    require(
        sizes == (len(signature.dense_names), signature.embedding_dim, stored) and 0 <= threshold < 0.5,
        f"{version.directory}: model.json and signature.json are not of one model; export anew",
    )
    return model, threshold


def read_dense(version: Version) -> dict[str, np.ndarray]:
    """Weights that are no table's, by name."""
    dense = {name: stored for name, stored in read_index(version).items() if not stored.tables}
    files = {name: ArrayFile(version, stored.files[0], stored.dtype) for name, stored in dense.items()}
    return {name: file.whole() for name, file in files.items()}


class TableFiles:
    """Where an export's tables lie, how they are stored (`kind`, signature.TABLE_TYPES) and how wide they are."""

    def __init__(self, version: Version, signature: Signature | None = None) -> None:
        self._version = version
        signature = signature or signatures.from_dict(version.read_json("signature.json"))
        self.kind, self.embedding_dim = signature.kind, signature.embedding_dim
        self._file_of: dict[str, tuple[str, str]] = {}
        for stored in read_index(version).values():
            for table, file in zip(stored.tables, stored.files, strict=False):
                self._file_of[table] = (file, stored.dtype)

    def stored(self, table: str) -> ArrayFile:
        """A table's rows as they are stored."""
        require(table in self._file_of, f"{self._version.directory}/weights.json has no table {table!r}; export anew")
        return ArrayFile(self._version, *self._file_of[table])

    def pooling_weights(self, table: str) -> ArrayFile:
        """(rows, 1) float32: what each row is multiplied with, where that was learned."""
        return self.stored(table + POOLING_WEIGHTS)


def require_fitting_files(version: Version, signature: Signature) -> None:
    """ConfigError for a table whose file has other rows or columns than the model has, by which ids are checked."""
    sizes = {f.table: (signature.stored_rows(f), signature.embedding_dim) for f in signature.features}
    if version.has("model.json"):
        model, _ = read_model(version)
        sizes = {table.name: (table.num_embeddings, table.embedding_dim) for table in model.tables}
    files = TableFiles(version, signature)
    for name, (rows, dim) in sizes.items():
        packed = {"int8": (dim + 4, "uint8"), "int4": (-(-dim // 2) + 4, "uint8")}
        columns, dtype = packed.get(signature.kind, (dim, signature.kind))
        file = files.stored(name)
        require(
            (file.shape, file.dtype.name) == ((rows, columns), dtype),
            f"{version.directory}: table {name!r} has {list(file.shape)} {file.dtype.name}, not the "
            f"{[rows, columns]} {dtype} of its model; export anew",
        )
