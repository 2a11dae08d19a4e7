"""Parts of gpu_goals.py, each a process: `python experiments/gpu_parts.py embedding xla 1`. The last line is JSON."""

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import FeatureConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TableConfig
from dlrm_jax.host import gpu_atomics
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.exchange import init_slots
from dlrm_jax.tables.kernels.choice import Kernels, table_ops
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.training.reporting import versions

TABLES, ROWS, DIM, BATCH, HOTNESS, SKEW = 10, 1_680_000, 128, 2048, 51, 1.05
SLOTS, TABLE_ROWS, WIDTH = 53_248, 1_000_000, 16
TURNS = 20


def milliseconds(step: Callable[..., Any], held: Any, *args: Any) -> float:
    """Of a call, TURNS of them dispatched back to back; `held` is given away and comes back first."""
    held = step(held, *args)
    jax.block_until_ready(held)
    start = time.perf_counter()
    for _ in range(TURNS):
        held = step(held, *args)
    jax.block_until_ready(held)
    return (time.perf_counter() - start) / TURNS * 1e3


def embedding(kernels: str, divisor: int) -> dict[str, float]:
    """Lookup, and lookup with update, of FBGEMM's published shape; ids by a power law over each table's rows."""
    rows, batch = ROWS // divisor, max(8, BATCH // divisor)
    model = ModelConfig(
        num_dense=DIM,
        tables=tuple(TableConfig(f"t{i}", rows, DIM) for i in range(TABLES)),
        features=tuple(FeatureConfig(f"f{i}", f"t{i}", HOTNESS) for i in range(TABLES)),
        bottom_mlp=(DIM,),
        top_mlp=(1,),
    )
    # The id of rank k is drawn with a chance of k^-SKEW, and ranks lie anywhere in a table.
    rng = np.random.default_rng(0)
    chances = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -SKEW)
    ranks = np.searchsorted(chances, rng.random((batch, TABLES * HOTNESS)) * chances[-1])
    ids = jnp.asarray(rng.permutation(rows)[np.minimum(ranks, rows - 1)], jnp.int32)
    stacks, mesh = local_stacks(model), make_mesh(MeshShape(1, 1))
    d_pooled = jnp.full((batch, TABLES, DIM), 1e-3)
    found = {}
    for rule in ("sgd", "adam"):
        settings = OptimizerConfig(ScheduleConfig(0.01), table=rule)
        ops = table_ops(Kernels(kernels, kernels), model, settings, stacks, mesh, ExchangeOptions())
        tables = {stack.name: jnp.zeros(stack.shape) for stack in stacks}
        states = functools.reduce(lambda some, stack: some | init_slots(settings, model, stack), stacks, {})

        @functools.partial(jax.jit, donate_argnums=0)
        def step(held: Any, ids: jax.Array, ops: Any = ops) -> Any:
            tables, states, _ = held
            pooled, routes = ops.lookup(tables, ops.route(ids, None))
            return *ops.update(tables, states, routes, d_pooled + 0 * pooled, 0.01, jnp.int32(1))[:2], pooled

        if rule == "sgd":

            @jax.jit
            def forward(pooled: Any, tables: Any, ids: jax.Array, ops: Any = ops) -> jax.Array:
                return ops.lookup(tables, ops.route(ids, None))[0]

            found["forward ms"] = milliseconds(forward, d_pooled, tables, ids)
        found[f"with {'SGD' if rule == 'sgd' else 'Adam'} ms"] = milliseconds(step, (tables, states, d_pooled), ids)
        del tables, states
    return found


def scatter(divisor: int) -> dict[str, float]:
    """Adding SLOTS rows to rows anywhere, and to three rows only."""
    slots, rows = SLOTS // divisor, TABLE_ROWS // divisor
    add = jax.jit(lambda table, ids, grad: table.at[ids].add(grad), donate_argnums=0)
    found = {}
    for name, most in (("anywhere ms", rows), ("three rows ms", 3)):
        ids = jnp.asarray(np.random.default_rng(0).integers(0, most, slots), jnp.int32)
        found[name] = milliseconds(add, jnp.zeros((rows, WIDTH)), ids, jnp.ones((slots, WIDTH)))
    return found


if __name__ == "__main__":
    gpu_atomics.use_hardware_additions()
    part, *rest = sys.argv[1:]
    done = {"embedding": lambda: embedding(rest[0], int(rest[1])), "scatter": lambda: scatter(int(rest[0]))}
    print(json.dumps(versions() if part == "versions" else done[part]()))
