"""Rows of a state in training are read where they lie, to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.tables.reshard import Kind
from dlrm_jax.training.live import live_rows
from dlrm_jax.training.placed import Placed
from tests.helpers import optimizer, tiny_model
from tests.placement_helpers import by_name

WEIGHTS = Kind("tables", weights=False, per_row=False)


@pytest.mark.parametrize("sharding", ["data_parallel", "row_wise", "column_wise"])
def test_rows_come_from_the_devices_that_hold_them(sharding):
    model, shape = tiny_model(), MeshShape(2, 2)
    placed = Placed(model, optimizer(), make_plan(model, shape, sharding), make_mesh(shape))
    state = placed.init_state(0)
    state = state.replace(tables={name: jnp.where(rows > 0, -0.0, rows) for name, rows in state.tables.items()})
    rows, want = live_rows(placed, state), by_name(placed, state.tables)
    for table in model.tables:
        row_M = np.arange(table.num_embeddings)[::-2]
        found = rows.at(WEIGHTS, table.name, row_M)
        np.testing.assert_array_equal(found.view(np.uint32), want[table.name][row_M].view(np.uint32))
        found = rows.rows(WEIGHTS, table.name, 0, 2, -(-table.num_embeddings // 2))
        np.testing.assert_array_equal(found.view(np.uint32), want[table.name][::2].view(np.uint32))
