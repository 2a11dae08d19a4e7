"""Small models trained on nothing, exported for tests of serving."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import LossConfig, ModelConfig
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.serving.artifact.export import export_model, of_arrays
from dlrm_jax.serving.artifact.export_delta import differing, export_delta
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.written import Pieces
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.dtypes import FLOAT32
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
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


def learned(state: TrainState, model: ModelConfig, rows: dict[str, list[int]], by: float) -> TrainState:
    """A state as steps that named these rows, by table, would leave it: they moved, and all that is no table did."""
    tables = dict(state.tables)
    for stack in local_stacks(model):
        for table, first_row in zip(stack.tables, stack.offset_T, strict=True):
            at = jnp.asarray([first_row + row for row in rows.get(table.name, ())], jnp.int32)
            for name in {stack.name, stack.name + POOLING_WEIGHTS} & set(tables):
                tables[name] = tables[name].at[at].add(by)
    dense = jax.tree.map(lambda leaf: leaf + by / 10, state.dense_params)
    return state.replace(tables=tables, dense_params=dense)


def pieces_of(model: ModelConfig, state: TrainState) -> Pieces:
    """A state's tables, for an export."""
    return of_arrays({name: np.asarray(rows) for name, rows in named_tables(model, state.tables)})


def export_state(model_dir: pathlib.Path, model: ModelConfig, state: TrainState, kind: str = "float32") -> Version:
    """A whole version of a state."""
    arguments = (model_dir, model, LossConfig(), state.dense_params, pieces_of(model, state), random_dataset(model))
    return export_model(*arguments, kind, {"step": 7}, ("test",), batch_stats=state.batch_stats)


def export_change(
    model_dir: pathlib.Path, parent: Version, model: ModelConfig, state: TrainState, **facts: object
) -> Version:
    """A delta of a state, whose rows are those that differ from a version."""
    rows_of = differing(pieces_of(model, state), parent.manifest["tables"])
    arguments = (model_dir, parent, model, LossConfig(), state.dense_params, rows_of, random_dataset(model))
    return export_delta(*arguments, {"step": 7, **facts}, ("test",), batch_stats=state.batch_stats)
