"""Before an export is whole, rows of the log are read as a server reads them: they must be what was learned from."""

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare.first_rows import FIRST_ROWS
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.signature import Signature
from dlrm_jax.serving.artifact.transform import Reader

_ROUNDING = 1e-5
"""What a logarithm of another machine may differ by."""


def require_as_prepared(reader: Reader, signature: Signature, dataset: Dataset) -> int:
    """How many of the log's first rows were compared; ConfigError for one that is read otherwise than it was prepared.

    A row that is bad where it has no types, as a number in a column of texts, is left out, as are those of a dataset
    that was prepared before first rows were kept.
    """
    if dataset.directory is None or not (dataset.directory / FIRST_ROWS).is_file():
        return 0
    rows, compared = dict(read_json(dataset.directory / FIRST_ROWS)), 0
    for split in dataset.splits.values():
        for prepared, order in split.windows(seed=0, epoch=0, shuffle=False):
            for i in order[np.isin(prepared.row_R[order], list(rows))].tolist():
                number = int(prepared.row_R[i])
                try:
                    dense_1xN, ids_1xK, _ = reader.read([rows[number]])
                except BadRequest:
                    continue
                other = _differing(signature, dense_1xN[0], ids_1xK[0], prepared.dense_RxN[i], prepared.ids_RxK[i])
                if other:
                    raise ConfigError(
                        f"row {number} of the log, read as a server would, has another {other} than in "
                        f"{dataset.directory}; prepare the dataset anew, and train again"
                    )
                compared += 1
            break  # The first rows are in the first window of their split.
    return compared


def _differing(
    signature: Signature, dense_N: np.ndarray, ids_K: np.ndarray, prepared_N: np.ndarray, prepared_K: np.ndarray
) -> str:
    close_N = np.isclose(dense_N, prepared_N, rtol=_ROUNDING, atol=_ROUNDING)
    if not close_N.all():
        return f"value of {signature.dense_names[int(np.argmin(close_N))]!r}"
    start = 0
    for feature in signature.features:
        slots = slice(start, start + feature.hotness)
        if not np.array_equal(ids_K[slots], prepared_K[slots]):
            return f"bag of {feature.name!r}"
        start = slots.stop
    return ""
