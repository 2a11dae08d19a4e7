"""Histograms of a run's weights and gradients: counted on the device at steps of the log, written when they are there.

They are of the state as some steps left it and of the gradients that the next batch gives it, which are computed once
more, apart from the training step: so that program is the same with histograms and without, and so are its bits.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import numpy as np

from dlrm_jax.data.batch import without_unweighted
from dlrm_jax.tables.norms import LIMITS, of_arrays, row_norms
from dlrm_jax.training.checksums import array_name
from dlrm_jax.training.feed import Feed, Window
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.reporting import MetricsLog
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import batch_gradients

ROWS, ROW_GRADIENTS, MLPS, MLP_GRADIENTS = "row_norms", "row_gradient_norms", "mlps", "mlp_gradients"
"""What TensorBoard shows them under, each with a name of a table or of an array behind a slash."""


def make_observed(config: RunConfig, placed: Placed, feed: Feed) -> Callable[[TrainState, Window], dict[str, Any]]:
    """`(state, window) -> histograms` by the names above, of the state and of its next batch's gradients.

    Gradients are those of the loss, before what --table_l2, --clip_norm and their kin make of them.
    """
    most = config.records.histogram_rows
    norms = row_norms(placed.model, placed.stacks, placed.mesh, placed.options, most)
    settings = (placed.model, config.loss, config.num_micro_batches, placed.ops, config.seed)

    def observed(state: TrainState, window: Window) -> dict[str, Any]:
        batch = without_unweighted(feed.batch(window, state.step))
        routes = placed.ops.route(batch.ids_BxK, batch.id_weights_BxK)
        found, routes = batch_gradients(*settings, state, batch, routes)
        rows, gradients = norms(state.tables, routes, found.d_pooled_BxFxD)
        of_mlps = {MLPS: state.dense_params, MLP_GRADIENTS: found.d_params}
        dense = {name: of_arrays(jax.tree.leaves(tree), most) for name, tree in of_mlps.items()}
        return {ROWS: rows, ROW_GRADIENTS: gradients, **dense}

    return observed


class Histograms:
    """When a run's histograms are due, and writing them to its log, by a thread that waits for the device.

    A context manager: at its end all are written.
    """

    def __init__(self, config: RunConfig, placed: Placed, log: MetricsLog) -> None:
        self._every, self._placed, self._log = config.log_every, placed, log
        leaves = jax.tree_util.tree_leaves_with_path(placed.abstract_state.dense_params)
        self._arrays = [array_name(path).replace(".", "/") for path, _ in leaves]
        self._seen: int | None = None
        self._thread = ThreadPoolExecutor(1, "histograms")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Histograms":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del error, traceback
        self._thread.shutdown()
        if self._writing is not None and kind is None:  # What ended the run is the error to tell.
            self._writing.result()

    def due(self, step: int) -> bool:
        """Whether `step`, which are done, are so many, or the first so many that have been dispatched since."""
        seen, self._seen = self._seen, step
        return step % self._every == 0 if seen is None else step // self._every > seen // self._every

    def push(self, step: int, found: dict[str, Any]) -> None:
        """Write what was dispatched behind `step`, once the device is done and those before it are written."""
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, step, found)

    def _write(self, step: int, found: dict[str, Any]) -> None:
        host = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), found)
        for kind in (ROWS, ROW_GRADIENTS):
            for stack in self._placed.stacks:
                names = [table.name for table in stack.tables]
                self._write_series(step, kind, names, host[kind][stack.name])
        for kind in (MLPS, MLP_GRADIENTS):
            self._write_series(step, kind, self._arrays, host[kind])

    def _write_series(self, step: int, kind: str, names: list[str], found: dict[str, np.ndarray]) -> None:
        for series, name in enumerate(names):
            one = {statistic: values[series] for statistic, values in found.items()}
            used = one["counts"] > 0
            if not used.any() or not np.isfinite(one["squares"]):
                continue  # A table that no example of the batch asked for; or what ends the run, which says so.
            shown = used | np.append(used[1:], False)  # Of empty buckets in a row the last, where the next begins.
            self._log.write_histogram(step, f"{kind}/{name}", one, LIMITS[shown], one["counts"][shown])
