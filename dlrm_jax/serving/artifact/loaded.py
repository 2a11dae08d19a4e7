"""An exported model in a process of its own: jax and numpy, no training code, no flags."""

import copy
import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dlrm_jax.config import EMPTY_SLOT, ConfigError, require
from dlrm_jax.host import memory
from dlrm_jax.serving.artifact import signature as signatures
from dlrm_jax.serving.artifact.deltas import Change, Delta, Layout, read_delta, read_layout, require_same_inputs
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.program import Program, require_read_apart
from dlrm_jax.serving.artifact.scatter import Scatter
from dlrm_jax.serving.artifact.signature import Signature
from dlrm_jax.serving.artifact.store import Version, open_regular, open_version
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.serving.artifact.vocabularies import (
    more_words,
    read_vocabularies,
    require_fitting_schema,
    vocabulary_files,
)
from dlrm_jax.serving.artifact.weights import read_index, read_weights, require_fitting_files

BATCH_SIZES = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
"""Batches are filled up to the next of these; larger ones are cut."""


class Noted(NamedTuple):
    """Probabilities of a few rows, noted at export: `name` in self_check.npz; others may differ by `tolerance`."""

    name: str
    tolerance: float


NOTED = Noted("probability", 1e-4)
"""Those of the exported program; on the same kind of device they differ by about 1e-7."""


class Engine(Protocol):
    """Where a version's weights lie and how they score.

    `batch_multiple` divides every batch that it is given; with `fixed_sizes` each is of one of the Servable's sizes.
    Its probabilities are those that `noted` names.
    """

    batch_multiple: int
    fixed_sizes: bool
    noted: Noted

    def run(self, dense_BxN: np.ndarray, ids_BxK: np.ndarray) -> Sequence[Any]:
        """(probability_B, logit_B)."""

    def change(self, delta: Delta, layout: Layout) -> Change:
        """What makes of these weights those of a delta, in place; got ready while batches are scored."""


class OneDevice:
    """All weights on the first device, and the exported program."""

    batch_multiple = 1
    fixed_sizes = True
    noted = NOTED
    _program: Program

    def __init__(self, version: Version, like: Engine | None = None, apart: bool = False) -> None:
        """Read a version's weights; the compiled program of `like` is kept where it is the same.

        With `apart` another one is read by a process of its own first: what ends that one does not end this one.
        """
        self._weights = read_weights(version)
        program = version.path("program.stablehlo").read_bytes()
        self._shapes = {name: (value.shape, value.dtype) for name, value in self._weights.items()}
        known = like if isinstance(like, OneDevice) and like._shapes == self._shapes else None
        same = known is not None and known._program.serialized == program
        if apart and not same:
            require_read_apart(program)
        self._program = known._program if known is not None and same else Program(program)

    def run(self, dense_BxN: np.ndarray, ids_BxK: np.ndarray) -> Sequence[Any]:
        """(probability_B, logit_B)."""
        compiled = self._program.compiled(self._weights, len(dense_BxN), dense_BxN.shape[1], ids_BxK.shape[1])
        return compiled(self._weights, dense_BxN, ids_BxK)

    def change(self, delta: Delta, layout: Layout) -> Change:
        """Rows are scattered into the arrays that are there, which are given away for it."""
        present, scatters = self._weights, {}
        for name, stored in layout.index.items():
            offsets = layout.offsets(name) if stored.tables else {}
            changed = [
                (row_M + offsets[table], rows) for table, (row_M, rows) in delta.rows.items() if table in offsets
            ]
            if changed:
                row_M, rows_MxD = (np.concatenate(parts) for parts in zip(*changed, strict=True))
                scatters[name] = Scatter(present[name], row_M, rows_MxD)
        dense = {name: jax.device_put(value) for name, value in delta.dense.items()}
        before = {name: present[name] for name in dense}

        def set_to(dense: Mapping[str, jax.Array], undone: bool) -> None:
            tables = {name: scatter(self._weights[name], undone) for name, scatter in scatters.items()}
            self._weights = jax.block_until_ready({**self._weights, **dense, **tables})

        return Change(lambda: set_to(dense, False), lambda: set_to(before, True))


MakeEngine = Callable[[Version, Engine | None], Engine]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says of B rows, and which version of it that is."""

    probability: np.ndarray
    logit: np.ndarray
    version: int = 0


@dataclasses.dataclass
class Weights:
    """An engine, and the number of the version that its weights are of: deltas change both."""

    engine: Engine
    number: int


class Servable:
    """One version of a model, ready to score. Its methods may be called from several threads.

    A delta changes the weights in place, so that those who still hold the Servable of the version before score by the
    new one too: Scores say which it is.
    """

    def __init__(
        self,
        version: Version,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        max_bag: int = 1000,
        like: "Servable | None" = None,
        make_engine: MakeEngine = OneDevice,
    ) -> None:
        """Read a version. What was compiled for `like`, another version's Servable, is kept where it is the same."""
        self.version = version
        self._take(signatures.from_dict(version.read_json("signature.json")))
        require_fitting_files(version, self.signature)
        self.metrics: dict[str, Any] = version.read_json("metrics.json")
        self.layout, self._max_bag = read_layout(version), max_bag
        self.weights = Weights(make_engine(version, like._engine if like is not None else None), version.number)
        multiple = self._engine.batch_multiple
        self.batch_sizes = tuple(sorted({-(-size // multiple) * multiple for size in batch_sizes}))
        self._words, self._vocabularies = vocabulary_files(version), read_vocabularies(version, self.signature)
        self.reader = Reader(self.signature, self._vocabularies, max_bag)
        version.require_unchanged()

    @property
    def _engine(self) -> Engine:
        return self.weights.engine

    def changed_by(self, version: Version) -> Callable[[], "Servable"]:
        """What makes of the weights in memory those of a delta of this version, which was opened by itself.

        All is read and checked here, while batches are scored. What is given back is to be called between two of them:
        it takes as long as its rows are written, gives the new version, and raises ConfigError, with all as it was,
        where the probabilities are not those that were noted with the delta.
        """
        ours = self.version.number, self.version.sha256
        require(
            version.changes == ours,
            f"{version.directory} changes version {(version.changes or (0, ''))[0]}, and {ours[0]} is served"
            + (" by that number, but another" if version.changes and version.changes[0] == ours[0] else ""),
        )
        signature = signatures.from_dict(version.read_json("signature.json"))
        require_same_inputs(signature, self.signature, version.directory)
        delta, more = read_delta(version, self.layout), more_words(version, self._words)
        sizes = {feature.table: feature.rows for feature in signature.features}
        for table, (keys, *_) in more.items():
            fits = len(self._vocabularies[table]) + len(keys) <= sizes[table]
            require(fits, f"{version.directory}: the vocabulary of table {table!r} does not fit its rows; export anew")
        require_fitting_schema(version, signature, self._words)
        after = copy.copy(self)
        after.version, after.metrics = version, version.read_json("metrics.json")
        after._take(signature)
        version.require_unchanged()
        change = self._engine.change(delta, self.layout)

        def apply() -> Servable:
            change.apply()
            try:
                after.self_check()
            except BaseException:
                change.undo()
                raise
            self.weights.number = version.number
            for table, columns in more.items():
                self._vocabularies[table].extend(*columns)
            if more or signature != self.signature:  # What it remembers of values that were unknown is no longer so.
                after.reader = Reader(signature, self._vocabularies, self._max_bag)
            return after

        return apply

    def _take(self, signature: Signature) -> None:
        self.signature = signature
        self._limit_K = np.repeat([f.rows for f in signature.features], [f.hotness for f in signature.features])

    def warm_up(self) -> None:
        """Compile every batch size and run it once, so that nothing is compiled later."""
        for size in self.batch_sizes:
            self._engine.run(
                np.zeros((size, len(self.signature.dense_names)), np.float32),
                np.full((size, self.signature.num_slots), EMPTY_SLOT, np.int32),
            )

    def self_check(self) -> float:
        """The largest difference from the probabilities noted at export; ConfigError beyond the tolerance."""
        path, (name, tolerance) = self.version.path("self_check.npz"), self._engine.noted
        try:
            with open_regular(path) as file, np.load(file) as noted:
                require(name in noted or name == NOTED.name, f"{name} is not there, which export --int8_layers notes")
                inputs, want = self.checked(noted["dense"], noted["ids"]), noted[name].astype(np.float32)
            require(len(want) > 0 and want.shape == inputs[0].shape[:1], "it has not a probability for each row")
        except (OSError, ValueError, LookupError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} holds no checked rows: {' '.join(str(error).split())}; export anew") from error
        difference = float(np.abs(self.score(*inputs).probability - want).max())
        if not difference <= tolerance:
            raise ConfigError(
                f"{self.version.directory}: probabilities differ by {difference:.3g} from those noted at export; at "
                f"most {tolerance:g} is rounding"
            )
        return difference

    def predict(self, dense_BxN: Any, ids_BxK: Any) -> np.ndarray:
        """The probability of each of B rows. BadRequest for a wrong shape, an id outside its table, NaN."""
        return self.score(*self.checked(dense_BxN, ids_BxK)).probability

    def predict_rows(self, rows: Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None = None) -> np.ndarray:
        """The probability of each row of raw values, as the training log had them; `shared` values are in all rows."""
        dense_BxN, ids_BxK, _ = self.reader.read(rows, shared)
        return self.score(dense_BxN, ids_BxK).probability

    def checked(self, dense_BxN: Any, ids_BxK: Any) -> tuple[np.ndarray, np.ndarray]:
        """Inputs as float32 and int32 arrays, every number usable."""
        try:
            dense_BxN, ids_BxK = np.asarray(dense_BxN), np.asarray(ids_BxK)
        except ValueError as error:  # Lists of several lengths.
            raise BadRequest(f"dense and ids must be arrays: {error}") from None
        num_dense, num_slots = len(self.signature.dense_names), self.signature.num_slots
        if dense_BxN.ndim != 2 or dense_BxN.shape[1] != num_dense:
            raise BadRequest(f"dense has shape {list(dense_BxN.shape)}; expected [rows, {num_dense}]")
        if ids_BxK.ndim != 2 or ids_BxK.shape[1] != num_slots:
            raise BadRequest(f"ids has shape {list(ids_BxK.shape)}; expected [rows, {num_slots}]")
        if len(dense_BxN) != len(ids_BxK):
            raise BadRequest(f"dense has {len(dense_BxN)} rows, ids {len(ids_BxK)}")
        if not np.issubdtype(ids_BxK.dtype, np.integer):
            raise BadRequest(f"ids are {ids_BxK.dtype}; they must be integers")
        if dense_BxN.dtype.kind not in "fiu":
            raise BadRequest(f"dense is {dense_BxN.dtype}; it must be numbers")
        if dense_BxN.dtype != np.float32:
            with np.errstate(over="ignore"):
                dense_BxN = dense_BxN.astype(np.float32)
        if not np.isfinite(dense_BxN).all():
            row, column = np.argwhere(~np.isfinite(dense_BxN))[0]
            raise BadRequest(
                f"dense, row {row}, feature {self.signature.dense_names[column]!r}: {dense_BxN[row, column]} is not a "
                "finite float32"
            )
        bad_BxK = (ids_BxK >= self._limit_K) | (ids_BxK < EMPTY_SLOT)
        if bad_BxK.any():
            row, slot = np.argwhere(bad_BxK)[0]
            feature = next(f for i, f in enumerate(self._slot_features()) if i == slot)
            raise BadRequest(
                f"ids, row {row}, feature {feature.name!r}: id {ids_BxK[row, slot]} is outside table {feature.table!r} "
                f"(ids 0 to {feature.rows - 1}, {EMPTY_SLOT} for an empty slot)"
            )
        return dense_BxN, ids_BxK.astype(np.int32, copy=False)

    def _slot_features(self) -> list[signatures.ServedFeature]:
        return [feature for feature in self.signature.features for _ in range(feature.hotness)]

    def score(self, dense_BxN: np.ndarray, ids_BxK: np.ndarray) -> Scores:
        """Scores of inputs that were `checked`."""
        rows, largest = len(dense_BxN), self.batch_sizes[-1]
        parts = []
        for start in range(0, rows, largest):
            dense, ids = dense_BxN[start : start + largest], ids_BxK[start : start + largest]
            count = len(dense)
            fixed = self._engine.fixed_sizes
            size = next(size for size in self.batch_sizes if size >= count) if fixed else count
            if size > count:
                dense = np.concatenate([dense, np.zeros((size - count, dense.shape[1]), np.float32)])
                ids = np.concatenate([ids, np.full((size - count, ids.shape[1]), EMPTY_SLOT, np.int32)])
            parts.append([np.asarray(output)[:count] for output in self._engine.run(dense, ids)])
        if len(parts) != 1:
            empty = np.zeros(0, np.float32)
            parts = [[np.concatenate([empty, *(part[i] for part in parts)]) for i in range(2)]]
        probability, logit = parts[0]
        return Scores(probability, logit, self.weights.number)


def load(
    model_dir: str | pathlib.Path,
    version: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    make_engine: MakeEngine = OneDevice,
) -> Servable:
    """A version of an exported model (the latest by default), every file checked against its hash.

    `make_engine=NativeCpu` (serving/artifact/native.py) scores by C++, `native_int8` there by int8 layers.
    """
    return Servable(open_version(pathlib.Path(model_dir), version), batch_sizes, make_engine=make_engine)


def require_room(version: Version, on_host: bool | None, oversubscribe: bool) -> tuple[str, str]:
    """ConfigError where a version's files are more than the memory holds that they are read into.

    That of the first device, unless `on_host`. (The largest holder, what would fit), for what fails all the same.
    """
    on_host = jax.devices()[0].platform == "cpu" if on_host is None else on_host
    sizes = {}
    for stored in read_index(version).values():
        for i, file in enumerate(stored.files):
            sizes[f"table {stored.tables[i]!r}" if stored.tables else file] = version.path(file).stat().st_size
    words = sum(version.path(file).stat().st_size for files in vocabulary_files(version).values() for file in files)
    largest, weights = max(sizes, key=lambda name: sizes[name]), sum(sizes.values())
    holder = f"{largest} ({memory.gigabytes(sizes[largest])})"
    what, remedy = f"serving {version.directory}", "an export with --tables=bfloat16, int8 or int4"
    if not on_host:
        device = jax.devices()[0]
        needs = (what, weights, memory.device_available(device), f"the memory of a {device.device_kind}", holder)
        memory.require_room(*needs, f"{remedy}, or several devices (--mesh=model:N)", oversubscribe)
    needed = words + on_host * weights
    holder = holder if on_host and sizes[largest] > words else f"the vocabularies ({memory.gigabytes(words)})"
    needs = (what, needed, memory.host_available(), "this machine's memory", holder)
    memory.require_room(*needs, remedy, oversubscribe)
    return f"{largest} ({memory.gigabytes(sizes[largest])})", remedy
