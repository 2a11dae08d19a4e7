"""What a training publishes, as versions in a directory that servers follow (training/publishing.py says when)."""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dlrm_jax.config import ConfigError, LossConfig, require
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.host import files
from dlrm_jax.serving.artifact.export import MakeScore, Scorer, checked_rows, described, export_model
from dlrm_jax.serving.artifact.export_delta import RowsOf, differing, export_delta
from dlrm_jax.serving.artifact.folded import folded
from dlrm_jax.serving.artifact.live_score import floats_at, live_score
from dlrm_jax.serving.artifact.spare import room_left, with_room
from dlrm_jax.serving.artifact.store import Version, open_version, prune, versions
from dlrm_jax.serving.artifact.weights import ArrayFile, read_dense, read_index, read_model
from dlrm_jax.serving.artifact.written import flat, pieces_of, stored_as, stored_rows
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.live import live_rows
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.publish_options import PublishOptions
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState

_LOG = logging.getLogger("dlrm_jax")
_PIECE_ROWS = 1 << 16
LOCK = ".publishing"
"""The file in a directory of versions whose lock is held by who publishes there."""


@contextlib.contextmanager
def open_publisher(config: RunConfig, placed: Placed, dataset: Dataset) -> Iterator["Publisher"]:
    """What publishes a run's versions (training.publishing.OpenPublisher)."""
    options = config.publishing
    model_dir = pathlib.Path(options.model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    with files.alone(model_dir / LOCK, f"another training publishes in {model_dir}"):
        yield Publisher(model_dir, options, placed, config.loss, dataset)


class Publisher:
    """Writes versions of one run's states into `model_dir`; of the whole ones there the last `keep` stay."""

    def __init__(
        self, model_dir: pathlib.Path, options: PublishOptions, placed: Placed, loss: LossConfig, dataset: Dataset
    ) -> None:
        self._model_dir, self._options, self._kind = model_dir, options, options.tables
        self._placed, self._loss, self._dataset = placed, loss, dataset
        self._checked = checked_rows(dataset)
        self._parent: Version | None = None

    def follow(self) -> int:
        """Go on behind the newest version there: how many deltas are in its chain, -1 where none can be followed."""
        self._parent = None
        there = versions(self._model_dir)
        if not there:
            return -1
        try:
            parent = open_version(self._model_dir, there[-1])
            kind = parent.manifest.get("tables")
            require(kind == self._kind, f"version {there[-1]} has tables of {kind}, --publish_tables={self._kind}")
        except (ValueError, OSError) as error:
            self._no_delta(error)
            return -1
        self._parent = parent
        return len(parent.chain) - 1

    def has(self, state: TrainState) -> bool:
        """Whether the version that is followed is this state, to the bit."""
        assert self._parent is not None
        parent, (model, params) = self._parent, folded(self._placed.model, *_copied(state))
        dense, then = flat(params), read_dense(parent)
        spare = room_left(model, read_model(parent)[0])
        same = spare == (parent.read_json("signature.json")["spare"] or {}) and dense.keys() == then.keys()
        same = same and described(with_room(model, spare), self._loss) == parent.read_json("model.json")
        same = same and all(np.array_equal(values, then[name]) for name, values in dense.items())
        rows_of = differing(pieces_of(self._placed.model, live_rows(self._placed, state)), self._kind)
        for array in read_index(parent).values() if same else ():
            for table, file in zip(array.tables, array.files, strict=False):
                same = same and not any(len(row_M) for row_M, _ in rows_of(table, ArrayFile(parent, file, array.dtype)))
        if same:
            _LOG.info("version %d is this model: no other one is published", parent.number)
        return same

    def whole(self, state: TrainState, facts: dict[str, Any]) -> Version:
        """Write all of a state."""
        model, rows = self._placed.model, live_rows(self._placed, state)
        dense, batch_stats = _copied(state)
        version = export_model(
            *(self._model_dir, model, self._loss, dense, pieces_of(model, rows), self._dataset, self._kind, facts),
            evaluated=(),
            make_score=self._scored(state),
            batch_stats=batch_stats,
            spare_rows=self._options.spare_rows,
        )
        return self._published(version)

    def compared(self, state: TrainState, facts: dict[str, Any]) -> bool:
        """Write what is other in a state than in the version that is followed; False where that is no delta, told."""
        assert self._parent is not None
        model, (dense, batch_stats) = self._placed.model, _copied(state)
        rows_of = differing(pieces_of(model, live_rows(self._placed, state)), self._kind)
        most = sum(table.num_embeddings for table in model.tables) * (1 + model.learned_pooling) * 9 // 10
        try:
            version = export_delta(
                *(self._model_dir, self._parent, model, self._loss, dense, _at_most(most, rows_of), self._dataset),
                facts,
                evaluated=(),
                make_score=self._scored(state),
                batch_stats=batch_stats,
            )
        except ConfigError as error:
            self._no_delta(error)
            return False
        self._published(version)
        return True

    def delta(self, state: TrainState, rows: dict[str, np.ndarray], facts: dict[str, Any]) -> Callable[[], Version]:
        """Copy these rows of a state; what is given back writes them as what changed since the version before."""
        parent, model = self._parent, self._placed.model
        if parent is None:
            raise ConfigError("there is no version yet that a delta would change")
        at, (dense, batch_stats) = floats_at(model, live_rows(self._placed, state)), _copied(state)
        suffixes = ("", POOLING_WEIGHTS) if model.learned_pooling else ("",)
        changed = {name + end: (row_M, at(name + end, row_M)) for name, row_M in rows.items() for end in suffixes}
        make_score = self._scored(state)

        def rows_of(name: str, before: ArrayFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            del before
            row_M, floats = changed[name]
            for first in range(0, len(row_M), _PIECE_ROWS):
                piece = slice(first, first + _PIECE_ROWS)
                (stored,) = stored_rows(name, [floats[piece]], stored_as(name, self._kind))
                yield row_M[piece], stored

        def write() -> Version:
            version = export_delta(
                *(self._model_dir, parent, model, self._loss, dense, rows_of, self._dataset, facts),
                evaluated=(),
                make_score=make_score,
                batch_stats=batch_stats,
                new_words=False,
            )
            return self._published(version)

        return write

    def _scored(self, state: TrainState) -> MakeScore:
        """Scores of the rows that are noted with a version, made now: the state goes on."""
        model, params = folded(self._placed.model, *_copied(state))
        at = floats_at(model, live_rows(self._placed, state))
        scores = live_score(model, self._loss, self._kind, params, at, self._checked)
        where = "not evaluated: published by a training"
        return lambda *_: Scorer(lambda dense, ids: scores, 1, where, self._checked)

    def _no_delta(self, error: Exception) -> None:
        _LOG.info("no delta of what is in %s: %s; the next version is whole", self._model_dir, _one_line(error))

    def _published(self, version: Version) -> Version:
        self._parent = version
        gone = prune(self._model_dir, self._options.keep)
        what = "whole"
        if version.parent is not None:
            what = f"{version.manifest['rows']:,} rows that changed since version {version.parent.number}"
        size = sum(facts["bytes"] for facts in version.manifest["files"].values())
        deleted = f"; {len(gone)} old ones deleted" if gone else ""
        _LOG.info(
            "published version %d, step %d: %s, %.2f MB%s",
            version.number,
            version.manifest["step"],
            what,
            size / 1e6,
            deleted,
        )
        return version


def _at_most(most: int, rows_of: RowsOf) -> RowsOf:
    """The same rows of all tables; ConfigError where they are more than `most`, and a whole version is less work."""
    count = 0

    def counted(name: str, before: ArrayFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal count
        for row_M, rows in rows_of(name, before):
            count += len(row_M)
            require(count <= most, "more than nine tenths of its rows are others now")
            yield row_M, rows

    return counted


def _one_line(error: Exception) -> str:
    """What an error says, without the advice to export a whole version: that is what is done."""
    return " ".join(str(error).split()).partition("; export ")[0]


def _copied(state: TrainState) -> tuple[Any, Any]:
    """(dense parameters, running averages), apart from the arrays that the next step is given."""
    copied: tuple[Any, Any] = jax.tree.map(np.array, (state.dense_params, state.batch_stats))
    return copied
