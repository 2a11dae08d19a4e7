"""What a training publishes, as versions in a directory that servers follow (training/publishing.py says when)."""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.host import files
from dlrm_jax.serving.artifact.export import MakeScore, Scorer, checked_rows, export_model
from dlrm_jax.serving.artifact.export_delta import export_delta
from dlrm_jax.serving.artifact.folded import folded
from dlrm_jax.serving.artifact.live_score import floats_at, live_score
from dlrm_jax.serving.artifact.store import Version, prune
from dlrm_jax.serving.artifact.weights import ArrayFile
from dlrm_jax.serving.artifact.written import pieces_of, stored_as, stored_rows
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.live import live_rows
from dlrm_jax.training.placed import Placed
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
        yield Publisher(model_dir, options.tables, options.keep, placed, config.loss, dataset)


class Publisher:
    """Writes versions of one run's states into `model_dir`; of the whole ones there the last `keep` stay."""

    def __init__(
        self, model_dir: pathlib.Path, kind: str, keep: int, placed: Placed, loss: LossConfig, dataset: Dataset
    ) -> None:
        self._model_dir, self._kind, self._keep = model_dir, kind, keep
        self._placed, self._loss, self._dataset = placed, loss, dataset
        self._checked = checked_rows(dataset)
        self._parent: Version | None = None

    def whole(self, state: TrainState, facts: dict[str, Any]) -> Version:
        """Write all of a state."""
        model, rows = self._placed.model, live_rows(self._placed, state)
        dense, batch_stats = _copied(state)
        version = export_model(
            *(self._model_dir, model, self._loss, dense, pieces_of(model, rows), self._dataset, self._kind, facts),
            evaluated=(),
            make_score=self._scored(state),
            batch_stats=batch_stats,
        )
        return self._published(version)

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

    def _published(self, version: Version) -> Version:
        self._parent = version
        gone = prune(self._model_dir, self._keep)
        what = "whole" if version.parent is None else f"{version.manifest['rows']:,} rows that changed"
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


def _copied(state: TrainState) -> tuple[Any, Any]:
    """(dense parameters, running averages), apart from the arrays that the next step is given."""
    copied: tuple[Any, Any] = jax.tree.map(np.array, (state.dense_params, state.batch_stats))
    return copied
