"""The floor of a step that is made of XLA's float32 products: these, and the rows that must be read and written.

Both are done here by themselves on the CPU at hand: the products of the layers' shapes one after the other; the rows as
arrays of as many bytes, read and written in order, which is faster than rows anywhere. The interaction, the
activations and the optimizers' arithmetic are left out.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ModelConfig
from dlrm_jax.data.batch import Batch

Floor = Callable[[int], Any]


def floors(model: ModelConfig, dense_params: dict[str, Any], batch: Batch) -> tuple[Floor, Floor]:
    """(a forward pass, a training step) of `batch`; give them the number of the step, as all sides are."""
    rows = len(batch.label_B)
    # Not the weights themselves, which a step gives away.
    ws = [
        jnp.ones_like(layer["kernel"])
        for part in sorted(dense_params)
        for _, layer in sorted(dense_params[part].items())
    ]
    xs, gs = [jnp.ones((rows, len(w))) for w in ws], [jnp.ones((rows, w.shape[1])) for w in ws]
    ids_BxK = np.asarray(batch.ids_BxK)
    width = model.tables[0].embedding_dim
    looked_up, updated = jnp.ones((ids_BxK.size, width)), [jnp.ones((distinct_rows(model, ids_BxK), width))]
    forward_products = jax.jit(lambda xs, ws: [x @ w for x, w in zip(xs, ws, strict=True)])
    # The input of bottom_mlp's first layer needs no gradient.
    backward_products = jax.jit(
        lambda xs, ws, gs: [(x.T @ g, g @ w.T if i else g) for i, (x, w, g) in enumerate(zip(xs, ws, gs, strict=True))]
    )
    read = jax.jit(lambda rows_MxD: rows_MxD.sum(axis=1))
    read_and_write = jax.jit(lambda rows_UxD: rows_UxD + 1, donate_argnums=0)

    def forward(i: int) -> tuple[list[jax.Array], jax.Array]:
        """(each layer's output, a number of each row looked up)."""
        del i
        return jax.block_until_ready((forward_products(xs, ws), read(looked_up)))

    def train_step(i: int) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array]:
        """(each layer's gradients of its weights and its input, the rows updated)."""
        forward(i)
        updated[0] = read_and_write(updated[0])
        return jax.block_until_ready((backward_products(xs, ws, gs), updated[0]))

    return forward, train_step


def distinct_rows(model: ModelConfig, ids_BxK: np.ndarray) -> int:
    """How many rows of all tables a batch's ids name."""
    starts = np.cumsum([0] + [feature.hotness for feature in model.features])
    ids = {table.name: [np.zeros(0, ids_BxK.dtype)] for table in model.tables}
    for feature, (start, stop) in zip(model.features, itertools.pairwise(starts), strict=True):
        ids[feature.table].append(ids_BxK[:, start:stop].ravel())
    return sum(np.count_nonzero(np.unique(np.concatenate(parts)) >= 0) for parts in ids.values())
