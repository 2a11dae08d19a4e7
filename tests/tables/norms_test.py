"""Histograms of row norms (`tables/norms.py`): the same under every placement, and bounded whatever the rows."""

import re

import jax
import numpy as np
import pytest

from dlrm_jax.config import FeatureConfig, ModelConfig, TableConfig
from dlrm_jax.tables import norms
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.training.options import ShardingOptions, place
from dlrm_jax.training.placed import Placed, on_one_device
from tests.helpers import SHARDINGS, optimizer, random_batch, tiny_model
from tests.placement_helpers import by_name

MOST = 5
OFTEN = ("row_wise", "column_wise")


def found_by_table(placed: Placed, batch) -> list[dict[str, dict[str, np.ndarray]]]:
    """(of rows, of gradients that are all one's own id's number of slots): what was counted, by table."""
    count = norms.row_norms(placed.model, placed.stacks, placed.mesh, placed.options, MOST)
    tables = placed.init_state(0).tables

    @jax.jit
    def counted(tables, batch):
        pooled, routes = placed.ops.lookup(tables, placed.ops.route(batch.ids_BxK, batch.id_weights_BxK))
        return count(tables, routes, jax.tree.map(lambda x: x + 1.0, pooled))

    return [
        {
            table.name: {name: np.asarray(value[t]) for name, value in one[stack.name].items()}
            for stack in placed.stacks
            for t, table in enumerate(stack.tables)
        }
        for one in counted(tables, placed.put(batch))
    ]


def assert_describes(found: dict[str, np.ndarray], values_M: np.ndarray) -> None:
    assert found["counts"].sum() == len(values_M)
    for name, value in {"least": values_M.min(), "most": values_M.max(), "sum": values_M.sum()}.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    np.testing.assert_allclose(found["squares"], np.square(values_M).sum(), rtol=1e-5)
    used = np.flatnonzero(found["counts"])
    assert norms.LIMITS[used[0] - 1] <= values_M.min() * (1 + 1e-6) and norms.LIMITS[used[-1]] >= values_M.max() / (
        1 + 1e-6
    )


@pytest.mark.parametrize(
    "sharding", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.exhaustive) for one in SHARDINGS]
)
@pytest.mark.sample(1)
def test_they_are_those_of_one_device_and_of_numpy(sharding):
    model, rule = tiny_model(), optimizer("rowwise_adagrad")
    batch = random_batch(model, 12)
    one = on_one_device(model, rule)
    several = place(model, rule, ShardingOptions(sharding, mesh="model:3"), devices=jax.devices()[:3])
    (rows, gradients), (their_rows, their_gradients) = (found_by_table(placed, batch) for placed in (several, one))
    for name, table in by_name(one, one.init_state(0).tables).items():
        every = -(-len(table) // MOST)
        assert_describes(rows[name], np.linalg.norm(table[::every], axis=1))
        assert_describes(their_rows[name], np.linalg.norm(table[::every], axis=1))
        np.testing.assert_array_equal(gradients[name]["counts"].sum(), their_gradients[name]["counts"].sum())
        for statistic in ("least", "most", "sum", "squares"):
            np.testing.assert_allclose(gradients[name][statistic], their_gradients[name][statistic], rtol=1e-5)
    named = np.unique(batch.ids_BxK[:, 0][batch.ids_BxK[:, 0] >= 0])
    assert gradients["user"]["counts"].sum() == len(named)


@pytest.mark.exhaustive
def test_rows_that_share_a_line_are_counted_alike():
    model, rule = tiny_model(), optimizer("rowwise_adagrad")
    plain, batch = on_one_device(model, rule), random_batch(model, 12)
    packed = Placed(model, rule, plain.plan, plain.mesh, packed=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found_by_table(packed, batch),
        found_by_table(plain, batch),
    )


def test_memory_does_not_grow_with_the_rows():
    def compiled(rows: int):
        tables = (TableConfig("big", rows, 8), TableConfig("small", 10, 8))
        features = (FeatureConfig("big", "big", hotness=2), FeatureConfig("small", "small"))
        model = ModelConfig(num_dense=3, tables=tables, features=features, bottom_mlp=(8,), top_mlp=(4, 1))
        placed = on_one_device(model, optimizer())
        (stack,) = local_stacks(model)
        count = norms.row_norms(model, placed.stacks, placed.mesh, placed.options, 500)

        def counted(tables, ids, d_pooled):
            return count(tables, placed.ops.route(ids, None), d_pooled)

        shapes = ({stack.name: jax.ShapeDtypeStruct(stack.shape, "float32")}, random_batch(model, 32).ids_BxK)
        return jax.jit(counted).lower(*shapes, np.zeros((32, 2, 8), np.float32)).compile()

    few, many = compiled(1_000), compiled(1_000_000)
    assert many.memory_analysis().temp_size_in_bytes <= few.memory_analysis().temp_size_in_bytes + 4096
    assert not re.search(r"f32\[100\d{4},8\]\S* copy\(", many.as_text())
