"""Criteo as arrays, as other tools leave it behind: read in slices, so that no file must fit into memory.

dlrm_npz: `X_int` (R, 13), `X_cat` (R, 26), `y` (R,) in one .npz, as facebookresearch/dlrm's data_utils.py writes.
mlperf_bin: int32 rows [y, 13, 26], as its data_loader_terabyte.py reads.
torchrec_npy: day_i_dense.npy, day_i_sparse.npy, day_i_labels.npy, as torchrec/datasets/criteo.py writes.
mlperf_multi_hot: day_i_sparse_multi_hot.npz, keys "0" to "25" of (R, hotness); dense and labels as torchrec_npy.
"""

import contextlib
import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import pyarrow as pa

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.source import Chunk, Columns, Position, refuse, require_columns
from dlrm_jax.data.schema.presets import CRITEO_DENSE, CRITEO_SPARSE
from dlrm_jax.data.schema.schema import Schema

_CHUNK_ROWS = 32_768
_BIN_COLUMNS = 1 + len(CRITEO_DENSE) + len(CRITEO_SPARSE)


@dataclasses.dataclass
class _Array:
    """One array of a file, read from any row on."""

    what: str
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
    """Rows `start` to `stop`; called with ascending starts."""


class ArraySource:
    """Rows of array files; `open_file` gives their named arrays."""

    def __init__(self, paths: tuple[str, ...], schema: Schema, kind: str) -> None:
        self.paths = paths
        self.num_bytes = sum(pathlib.Path(path).stat().st_size for path in paths)
        self._open = _OPENERS[kind]
        require_columns(f"format {kind}", ["Label", *CRITEO_DENSE, *CRITEO_SPARSE], schema.source_columns())

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """Chunks from `start` on; offsets count rows."""
        done = sum(pathlib.Path(path).stat().st_size for path in self.paths[: start.file])
        for file in range(start.file, len(self.paths)):
            path = self.paths[file]
            size = pathlib.Path(path).stat().st_size
            first = start.offset if file == start.file else 0
            try:
                with self._open(path) as arrays:
                    num_rows = _common_rows(path, arrays)
                    for row in range(first, num_rows, _CHUNK_ROWS):
                        stop = min(row + _CHUNK_ROWS, num_rows)
                        parts = {name: array.read(row, stop) for name, array in arrays.items()}
                        parse = functools.partial(_columns, path, parts, row)
                        yield Chunk(file, Position(file, stop), done + size * stop // num_rows, parse)
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
                if isinstance(error, ConfigError):
                    raise
                refuse(path, error)
            done += size


def _common_rows(path: str, arrays: dict[str, _Array]) -> int:
    rows = {array.what: array.shape[0] for array in arrays.values()}
    if len(set(rows.values())) > 1:
        raise ConfigError(f"{path}: " + ", ".join(f"{what} has {count} rows" for what, count in rows.items()))
    for name, width in (("dense", len(CRITEO_DENSE)), ("sparse", len(CRITEO_SPARSE))):
        if name in arrays and arrays[name].shape[1:] != (width,):
            raise ConfigError(f"{path}: {arrays[name].what} has shape {arrays[name].shape}; expected {width} columns")
    return next(iter(rows.values()))


def _columns(path: str, parts: dict[str, np.ndarray], first_row: int) -> Columns:
    label_R = parts["label"].reshape(len(parts["label"]), -1)[:, 0]
    arrays = {"Label": pa.array(np.ascontiguousarray(label_R))}
    for i, name in enumerate(CRITEO_DENSE):
        arrays[name] = pa.array(np.ascontiguousarray(parts["dense"][:, i]))
    for i, name in enumerate(CRITEO_SPARSE):
        if "sparse" in parts:
            arrays[name] = pa.array(_unsigned(parts["sparse"][:, i]))
        else:
            bags = parts[name]
            arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(_unsigned(bags.ravel())), bags.shape[1])
    return Columns(arrays, np.arange(len(label_R)), len(label_R), [], lambda row: first_row + row, "row")


def _unsigned(ids: np.ndarray) -> np.ndarray:
    """TorchRec keeps 32-bit ids in int32, the upper half as negative numbers."""
    ids = np.ascontiguousarray(ids)
    return ids.view(np.uint32) if ids.dtype == np.int32 else ids


def _mapped(path: pathlib.Path, dtype: np.dtype | None = None, columns: int = 0) -> _Array:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; it belongs beside the file that --input names")
    if dtype is None:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        size = path.stat().st_size
        if not size or size % (columns * dtype.itemsize):
            raise ConfigError(f"{path} has {size} bytes; expected a multiple of {columns * dtype.itemsize} above 0")
        array = np.memmap(path, dtype, "r").reshape(-1, columns)
    if array.ndim == 0 or array.dtype.kind not in "iuf":
        raise ConfigError(f"{path} holds {array.dtype} of shape {array.shape}; expected rows of numbers")
    return _Array(path.name, array.shape, lambda start, stop: np.array(array[start:stop]))


@contextlib.contextmanager
def _open_bin(path: str) -> Iterator[dict[str, _Array]]:
    whole = _mapped(pathlib.Path(path), np.dtype("<i4"), _BIN_COLUMNS)
    bounds = {"label": (0, 1), "dense": (1, 14), "sparse": (14, 40)}
    yield {
        name: _Array(name, (whole.shape[0], high - low), functools.partial(_slice_columns, whole.read, low, high))
        for name, (low, high) in bounds.items()
    }


def _slice_columns(read: Callable[[int, int], np.ndarray], low: int, high: int, start: int, stop: int) -> np.ndarray:
    return read(start, stop)[:, low:high]


@contextlib.contextmanager
def _open_torchrec(path: str) -> Iterator[dict[str, _Array]]:
    yield {name: _mapped(_beside(path, "dense", file)) for name, file in _NPY_FILES.items()}


_NPY_FILES = {"label": "labels", "dense": "dense", "sparse": "sparse"}


def _beside(path: str, part: str, other: str) -> pathlib.Path:
    name = pathlib.Path(path).name
    if part not in name:
        raise ConfigError(f"{path}: expected the file whose name has {part!r} in it, as day_0_{part}")
    stem = name.replace(part, other)
    return pathlib.Path(path).with_name(pathlib.Path(stem).with_suffix(".npy").name)


@contextlib.contextmanager
def _open_multi_hot(path: str) -> Iterator[dict[str, _Array]]:
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        arrays = {name: _mapped(_beside(path, "sparse_multi_hot", _NPY_FILES[name])) for name in ("label", "dense")}
        for i, name in enumerate(CRITEO_SPARSE):
            arrays[name] = _zipped(path, archive, stack, str(i))
        yield arrays


@contextlib.contextmanager
def _open_npz(path: str) -> Iterator[dict[str, _Array]]:
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        keys = {"label": "y", "dense": "X_int", "sparse": "X_cat"}
        yield {name: _zipped(path, archive, stack, key) for name, key in keys.items()}


def _zipped(path: str, archive: zipfile.ZipFile, stack: contextlib.ExitStack, key: str) -> _Array:
    """An array of an .npz as a stream: a compressed one cannot be mapped."""
    if f"{key}.npy" not in archive.namelist():
        names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
        raise ConfigError(f"{path} has no array {key!r}; it has {names}")
    stream = stack.enter_context(archive.open(f"{key}.npy"))
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = header(stream)
    if dtype.kind not in "iuf" or not shape:
        raise ConfigError(f"{path}: array {key!r} holds {dtype} of shape {shape}; expected rows of numbers")
    if column_major and len(shape) > 1:
        whole = np.frombuffer(stream.read(), dtype).reshape(shape, order="F")
        return _Array(key, shape, lambda start, stop: whole[start:stop])
    return _Array(key, shape, _RowStream(stream, shape, dtype).read)


class _RowStream:
    def __init__(self, stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._stream, self._shape, self._dtype, self._row = stream, shape, dtype, 0
        self._row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))

    def read(self, start: int, stop: int) -> np.ndarray:
        skipped = (start - self._row) * self._row_bytes
        while skipped > 0:
            block = self._stream.read(min(skipped, 1 << 24))
            if not block:
                raise EOFError("the archive ends early")
            skipped -= len(block)
        data = self._stream.read((stop - start) * self._row_bytes)
        if len(data) < (stop - start) * self._row_bytes:
            raise EOFError("the archive ends early")
        self._row = stop
        return np.frombuffer(data, self._dtype).reshape(stop - start, *self._shape[1:])


def fit_hotness(schema: Schema, path: str) -> Schema:
    """The schema with the hotness that the arrays of a multi-hot file have."""
    with _open_multi_hot(path) as arrays:
        sparse = tuple(dataclasses.replace(s, hotness=int(np.prod(arrays[s.source].shape[1:]))) for s in schema.sparse)
    return dataclasses.replace(schema, sparse=sparse)


_OPENERS = {
    "dlrm_npz": _open_npz,
    "mlperf_bin": _open_bin,
    "torchrec_npy": _open_torchrec,
    "mlperf_multi_hot": _open_multi_hot,
}
