"""Small models trained on nothing, exported for tests of serving."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import LossConfig, ModelConfig
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.serving.artifact.export import export_model, of_arrays
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.dtypes import FLOAT32
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.training.state import TrainState, init_state
from tests.helpers import optimizer, random_batch


def random_dataset(model: ModelConfig, rows: int = 200) -> Dataset:
    """Random rows in every split."""
    splits = {}
    for seed, name in enumerate(("train", "val", "test")):
        batch = random_batch(model, rows, seed)
        splits[name] = Split(batch.dense_BxN, batch.ids_BxK, batch.label_B, np.arange(rows))
    return Dataset(
        name="tiny",
        dense_names=tuple(f"x{i}" for i in range(model.num_dense)),
        features=model.features,
        table_sizes={table.name: table.num_embeddings for table in model.tables},
        splits=splits,
    )


def lively_state(model: ModelConfig, seed: int = 0) -> TrainState:
    """A fresh state with tables large enough that each id shows in the probability, and averages of batch norms."""
    state = init_state(model, optimizer(), seed)
    dtypes = {stack.name: stack.dtype for stack in local_stacks(model)}
    stats = jax.tree.map(lambda leaf: leaf + jnp.linspace(0.1, 1, len(leaf)), state.batch_stats)

    def tripled(name: str) -> jax.Array:
        dtype = dtypes.get(name, FLOAT32)  # FLOAT32: learned pooling weights.
        return dtype.from_floats(dtype.to_floats(state.tables[name]) * 3)

    return state.replace(tables={name: tripled(name) for name in state.tables}, batch_stats=stats)


def export_tiny(
    model_dir: pathlib.Path, model: ModelConfig, kind: str = "float32", seed: int = 0, loss: LossConfig | None = None
) -> Version:
    """Export a random model on random data."""
    state = lively_state(model, seed)
    tables = {name: np.asarray(rows) for name, rows in named_tables(model, state.tables)}
    data = random_dataset(model)
    loss = loss or LossConfig()
    return export_model(
        *(model_dir, model, loss, state.dense_params, of_arrays(tables), data, kind),
        evaluated=("test",),
        batch_stats=state.batch_stats,
    )
