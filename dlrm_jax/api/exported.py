"""An exported model as what a training may begin from: training itself knows no exports."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import require
from dlrm_jax.serving.artifact import signature as signatures
from dlrm_jax.serving.artifact.export import nested
from dlrm_jax.serving.artifact.spare import without_room
from dlrm_jax.serving.artifact.store import open_version
from dlrm_jax.serving.artifact.weights import TableFiles, read_dense, read_model
from dlrm_jax.tables.reshard import Kind
from dlrm_jax.training.origin import Origin


class _Rows:
    """The rows of an export's tables (reshard.Rows), float32."""

    def __init__(self, files: TableFiles) -> None:
        self._files = files

    def rows(self, kind: Kind, table: str, first: int, step: int, count: int) -> np.ndarray:
        """(count, columns): logical rows first, first + step, ... of a table."""
        file = self._files.pooling_weights(table) if kind.weights else self._files.stored(table)
        rows = file.rows(first, first + step * (count - 1) + 1, step)
        return rows.astype(np.float32, copy=False)


def open_exported(model_dir: pathlib.Path) -> Origin:
    """The weights of the newest whole version in `model_dir`; ConfigError for tables of fewer bits than bfloat16."""
    version = open_version(model_dir)
    signature = signatures.from_dict(version.read_json("signature.json"))
    require(
        signature.kind in ("float32", "bfloat16"),
        f"--init_from={model_dir}: version {version.number} has tables of {signature.kind}, which nothing is trained "
        "on from; export with --tables=float32, or give the run's workdir",
    )
    model = without_room(read_model(version)[0], signature)
    dense: dict[str, Any] = {"dense_params": nested({name: jnp.asarray(a) for name, a in read_dense(version).items()})}
    return Origin(
        name=f"{model_dir}, version {version.number}",
        model=model,
        dense=dense,
        rows=_Rows(TableFiles(version, signature)),
        schema=signature.schema,
    )
