"""Random models, batches and plans, each a function of its seed, and their states on a mesh and off it."""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import (
    EMPTY_SLOT,
    FeatureConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TableConfig,
)
from dlrm_jax.config import model as model_settings
from dlrm_jax.data.batch import Batch
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import TrainState, init_dense, new_state
from dlrm_jax.training.step import dense_gradients, make_train_step
from tests import oracle
from tests.helpers import SHARDINGS, meeting
from tests.placement_helpers import by_name, pad, store

MESHES = ((1, 2), (1, 4), (2, 2), (2, 4), (1, 8), (8, 1), (4, 2), (1, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is trained, and where it lies."""

    seed: int
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    batch_size: int
    micro_batches: int
    weighted_ids: bool
    mesh: MeshShape
    sharding: dict[str, str]
    capacity: int
    packed: bool

    def __str__(self) -> str:
        m, kinds = self.model, {f"{f.table}x{f.hotness}{f.pooling[0]}" for f in self.model.features}
        return (
            f"seed {self.seed}: {m.interaction.name}{dict(m.interaction.options)} N={m.num_dense} "
            f"embedded={m.embedded} bottom={m.bottom_mlp} D={m.embedding_dim} learned={m.learned_pooling} "
            f"{self.loss.name}/{self.loss.threshold} dense={self.optimizer.dense} table={self.optimizer.table} "
            f"eps={self.optimizer.eps} lr={self.optimizer.schedule.learning_rate} B={self.batch_size} "
            f"G={self.micro_batches} weighted={self.weighted_ids} {self.mesh} {self.sharding} "
            f"capacity={self.capacity} packed={self.packed} {sorted(kinds)}"
        )

    def again(self, trial: int) -> "Case":
        """The same model, plan and training from other weights on other data."""
        return dataclasses.replace(self, seed=self.seed + 1_000_000 * trial)

    def on_one_device(self) -> "Case":
        """The same without a mesh."""
        one = dict.fromkeys(self.sharding, "data_parallel")
        return dataclasses.replace(self, mesh=MeshShape(1, 1), sharding=one, capacity=0, packed=False)

    def placed(self) -> Placed:
        """The model under its plan."""
        plan = make_plan(self.model, self.mesh, self.sharding)
        options = ExchangeOptions("", {"routed_0": self.capacity} if self.capacity else {})
        return Placed(self.model, self.optimizer, plan, make_mesh(self.mesh), options, self.packed)

    def batch(self, step: int) -> Batch:
        """Examples of step `step`; rows have weights, some 0, and skewed ids, some bags empty."""
        rng = np.random.default_rng((self.seed, step))
        columns = []
        for feature in self.model.features:
            rows, shape = self.model.table(feature.table).num_embeddings, (self.batch_size, feature.hotness)
            ids = (rows * rng.random(shape) ** rng.choice([1, 4])).astype(np.int32)
            ids[rng.random(shape) < 0.2] = EMPTY_SLOT
            ids[rng.random(self.batch_size) < 0.1] = EMPTY_SLOT
            columns.append(ids)
        ids_BxK = np.concatenate(columns, axis=1)
        weight_B = rng.choice([0, 0.5, 1, 1, 1], self.batch_size)
        weight_B[0] = 1
        return Batch(
            dense_BxN=rng.normal(size=(self.batch_size, self.model.num_dense)).astype(np.float32),
            ids_BxK=ids_BxK,
            label_B=rng.integers(0, 2, self.batch_size).astype(np.float32),
            weight_B=weight_B.astype(np.float32),
            id_weights_BxK=rng.normal(size=ids_BxK.shape).astype(np.float32) if self.weighted_ids else None,
        )

    def params(self) -> dict[str, dict]:
        """Initial weights as the oracle has them: `dense`, and `tables` by name. float32 values."""
        rng = np.random.default_rng(self.seed)
        shapes = jax.eval_shape(lambda: init_dense(self.model, 0))
        dense = jax.tree.map(lambda s: rng.normal(size=s.shape) / max(s.shape) ** 0.5, shapes)
        tables = {t.name: rng.normal(size=(t.num_embeddings, t.embedding_dim)) / 2 for t in self.model.tables}
        if self.model.learned_pooling:
            tables |= {
                t.name + POOLING_WEIGHTS: 1 + rng.normal(size=(t.num_embeddings, 1)) / 4 for t in self.model.tables
            }
        return jax.tree.map(lambda w: w.astype(np.float32), {"dense": dense, "tables": tables})


def draw(seed: int) -> Case:
    """The case of this seed."""
    rng = np.random.default_rng((seed, 15))

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    dim = one_of(1, 2, 3, 4, 5, 8)
    tables = tuple(TableConfig(f"t{i}", one_of(1, 2, 5, 13, 40), dim) for i in range(rng.integers(1, 5)))
    features = [
        FeatureConfig(f"f{i}", t.name, one_of(1, 1, 2, 3, 7), one_of("sum", "mean")) for i, t in enumerate(tables)
    ]
    for i in range(rng.integers(0, 3)):
        features.append(FeatureConfig(f"more{i}", one_of(*tables).name, one_of(1, 2, 5), one_of("sum", "mean")))
    fields = {
        "num_dense": one_of(1, 3),
        "tables": tables,
        "features": tuple(features[i] for i in rng.permutation(len(features))),
        "bottom_mlp": one_of((dim,), (4, dim)),
        "top_mlp": one_of((1,), (5, 1), (4, 3, 1)),
        "interaction": one_of("dot", "cat", "cross"),
        "self_interaction": bool(rng.integers(2)),
        "cross_layers": int(rng.integers(1, 7)),
        "cross_rank": one_of(1, 2, 4),
        "learned_pooling": bool(rng.random() < 0.4),
    }
    fields |= _other_interaction(seed, dim)
    fields |= _embedded_numbers(seed, fields["num_dense"])
    model = ModelConfig(**meeting(fields))
    loss = LossConfig(one_of("bce", "wbce", "mse"), (0.5, 2.0), one_of(0.0, 0.0, 0.01, 0.2))
    dense = one_of("sgd", "momentum", "adagrad", "adam", "adamw")
    optimizer = OptimizerConfig(
        schedule=ScheduleConfig(learning_rate=one_of(0.5, 0.5, 0.0625)),
        dense=dense,
        table=one_of("sgd", "adagrad", "rowwise_adagrad"),
        eps=one_of(1e-10, 1e-4),
        weight_decay=0.0625 if dense == "adamw" else 0.0,
    )
    mesh = MeshShape(*one_of(*MESHES))
    return Case(
        seed=seed,
        model=model,
        loss=loss,
        optimizer=optimizer,
        batch_size=one_of(1, 5, mesh.size, 16, 33),
        micro_batches=one_of(1, 1, 2, 3),
        weighted_ids=bool(rng.random() < 0.4),
        mesh=mesh,
        sharding={table.name: one_of(*SHARDINGS) for table in tables},
        capacity=one_of(0, 0, 1, 3),
        packed=bool(rng.random() < 0.2),
    )


def _other_interaction(seed: int, dim: int) -> dict:
    """For every second seed, fields of a model with one of the interactions that came later, or without numbers."""
    rng = np.random.default_rng((seed, 16))
    if rng.random() < 0.5:
        return {}
    fields = {"tower_mlp": (4, 2), "projection_branch1": (3, 2 * dim), "projection_branch2": (3 * dim,)}
    fields["interaction"] = str(rng.choice(["full_cross", "parallel_cross", "fm", "projection"]))
    return fields | ({"num_dense": 0, "bottom_mlp": ()} if rng.random() < 0.5 else {})


def _embedded_numbers(seed: int, num_dense: int) -> dict:
    """For every third seed whose model has numbers, fields of one that embeds them, half without a bottom MLP."""
    rng = np.random.default_rng((seed, 17))
    if not num_dense or rng.random() > 1 / 3:
        return {}
    if rng.random() < 1 / 4:
        return {"embedded_columns": tuple(sorted({*rng.integers(0, num_dense, 2).tolist()}))}
    return {"embed_numbers": True} | ({"bottom_mlp": ()} if rng.random() < 0.5 else {})


def make_trainer(case: Case, dtype: str = "float32"):
    """`(case, number of steps) -> [weights after each step]`, compiled once for all of a case's `again(trial)`."""
    placed, model = case.placed(), case.model
    assert placed.abstract_state  # Shapes are known before float64 is switched on, under which ids would be 64-bit.
    with _computing_in(dtype):
        if dtype == "float64":
            model = dataclasses.replace(model, compute_dtype=dtype)
        step = make_train_step(model, case.loss, case.optimizer, case.micro_batches, placed.ops)
    step = placed.jit_step(step)

    def train(case: Case, num_steps: int) -> list[dict]:
        params, trained = case.params(), []
        with _computing_in(dtype):
            state = state_of(placed, params, dtype)
            for i in range(num_steps):
                batch = pad(case.batch(i), placed.num_devices * case.micro_batches)
                state, _ = step(state, placed.put(cast(batch, dtype)))
                trained.append(weights_of(placed, state))
        return trained

    return train


def make_oracle(case: Case):
    """As `make_trainer`, by the oracle in float64."""
    step = jax.jit(oracle.make_step(case.model, case.loss, case.optimizer))

    def train(case: Case, num_steps: int) -> list[dict]:
        params, states, trained = jax.tree.map(np.float64, case.params()), {}, []
        with jax.enable_x64(True):
            for i in range(num_steps):
                params, states, _ = step(params, states, i, cast(case.batch(i), "float64"))
                trained.append(jax.tree.map(np.asarray, params))
        return trained

    return train


def make_gradients(case: Case):
    """`case -> weights' gradients` of its first batch, in float32 where `case` lies."""
    placed = case.placed()
    plain = dataclasses.replace(case.optimizer, table="sgd", dense="sgd", weight_decay=0.0)
    placed = dataclasses.replace(placed, optimizer=plain)

    def step(state: TrainState, batch: Batch):
        pooled, routes = placed.ops.lookup(state.tables, placed.ops.route(batch.ids_BxK, batch.id_weights_BxK))
        parts = (case.model, case.loss, state.dense_params, batch, pooled, case.micro_batches, placed.ops)
        _, d_dense, d_pooled, *_ = dense_gradients(*parts)
        # What SGD adds at a rate of -1 is the gradient, to the last bit of the weight that it is added to.
        return d_dense, placed.ops.update(state.tables, state.table_opt_state, routes, d_pooled, jnp.float32(-1), 1)[0]

    step = jax.jit(step)

    def gradients(case: Case) -> dict:
        params = case.params()
        batch = placed.put(pad(case.batch(0), placed.num_devices * case.micro_batches))
        d_dense, added = step(state_of(placed, params), batch)
        new = _named(placed, added)
        return {
            "dense": jax.tree.map(np.asarray, d_dense),
            "tables": {name: new[name] - table for name, table in params["tables"].items()},
        }

    return gradients


def weights_of(placed: Placed, state: TrainState) -> dict:
    """All weights, by name, as the oracle has them."""
    return {"dense": jax.tree.map(np.asarray, state.dense_params), "tables": _named(placed, state.tables)}


def _named(placed: Placed, tables) -> dict:
    if placed.mesh.size == 1 and not placed.packed:
        return {name: np.asarray(table) for name, table in named_tables(placed.model, tables)}
    return by_name(placed, tables)


def state_of(placed: Placed, params: dict, dtype: str = "float32") -> TrainState:
    """The state at step 0 with these weights, as `placed` stores it."""
    dense = jax.tree.map(lambda w: np.asarray(w, dtype), params["dense"])
    tables = {name: np.asarray(table, dtype) for name, table in params["tables"].items()}
    state = new_state(placed.model, placed.optimizer, dense, {}).replace(
        tables=store(placed, tables),
        table_opt_state=jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), placed.abstract_state.table_opt_state),
    )
    return jax.tree.map(lambda leaf, place: jax.device_put(np.asarray(leaf), place), state, placed.shardings)


def cast(batch: Batch, dtype: str) -> Batch:
    """The batch with its floats as `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, batch)


@contextlib.contextmanager
def _computing_in(dtype: str):
    """In "float64" whatever the package computes in float32 it computes so, and rounds a billion times less."""
    if dtype == "float32":
        yield
        return
    dtypes = mock.patch.object(model_settings, "check_settings", lambda config: None)  # Else it is no choice.
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64), dtypes:
        yield
