"""Batch: what flows from the data to the step, and the host-side checks it must pass first."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlrm_jax.config import EMPTY_SLOT, ConfigError, ModelConfig


class Batch(struct.PyTreeNode):
    """B examples side by side: NumPy arrays on the host, jax.Array on a device.

    `ids_BxK` holds the bags of all features next to each other in config order, feature f taking `hotness` slots;
    unused slots are EMPTY_SLOT. `weight_B` is 0 for padding rows, which then count in no loss and no metric.
    `id_weights_BxK`, when given, multiplies each looked-up row before pooling.
    """

    dense_BxN: jax.Array
    ids_BxK: jax.Array
    label_B: jax.Array
    weight_B: jax.Array
    id_weights_BxK: jax.Array | None = None


def without_unweighted(batch: Batch) -> Batch:
    """The batch with all inputs of rows of weight 0 empty, for use inside a jitted step.

    A NaN there would else reach every gradient, as 0 times NaN; and no row of a table is updated for their sake.
    """

    def kept(column: jax.Array, filler: int) -> jax.Array:
        return jnp.where((batch.weight_B > 0).reshape(-1, *[1] * (column.ndim - 1)), column, filler)

    return batch.replace(
        dense_BxN=kept(batch.dense_BxN, 0),
        ids_BxK=kept(batch.ids_BxK, EMPTY_SLOT),
        label_B=kept(batch.label_B, 0),
        id_weights_BxK=None if batch.id_weights_BxK is None else kept(batch.id_weights_BxK, 0),
    )


def check_ids(config: ModelConfig, ids_BxK: np.ndarray, row_B: np.ndarray | None = None) -> None:
    """ConfigError naming feature, row, value and limit of the first id outside its table that is no EMPTY_SLOT.

    `row_B` are numbers of the rows for the error text, by default their positions. Ids must be integers.
    """
    if not np.issubdtype(ids_BxK.dtype, np.integer):
        raise ConfigError(f"ids have dtype {ids_BxK.dtype}; they must be integers (float32 rounds ids beyond 2^24)")
    if ids_BxK.ndim != 2 or ids_BxK.shape[1] != config.num_slots:
        raise ConfigError(f"ids have shape {ids_BxK.shape}; expected (rows, {config.num_slots}), one column a slot")
    feature_K = [feature for feature in config.features for _ in range(feature.hotness)]
    limit_K = np.array([config.num_ids(feature) for feature in feature_K])
    bad_BxK = (ids_BxK >= limit_K) | (ids_BxK < EMPTY_SLOT)
    if bad_BxK.any():
        row, slot = np.argwhere(bad_BxK)[0]
        feature, last = feature_K[slot], limit_K[slot] - 1
        raise ConfigError(
            f"feature {feature.name!r}, row {row if row_B is None else row_B[row]}: id {ids_BxK[row, slot]} is outside "
            f"table {feature.table!r} of {last + 1} rows (ids 0 to {last}, {EMPTY_SLOT} for an empty slot)"
        )


def pack_bags(name: str, values: np.ndarray, lengths_B: np.ndarray, hotness: int) -> np.ndarray:
    """Jagged bags (`values` concatenated, `lengths_B` ids each) as (B, hotness) slots, padded with EMPTY_SLOT.

    Raises ConfigError, naming feature and row, for a bag of more than `hotness` ids or lengths that do not add up.
    """
    lengths_B = np.asarray(lengths_B)
    if lengths_B.sum() != len(values) or (lengths_B < 0).any():
        raise ConfigError(f"feature {name!r}: bag lengths add up to {lengths_B.sum()}, but there are {len(values)} ids")
    if len(lengths_B) and lengths_B.max() > hotness:
        row = int(np.argmax(lengths_B > hotness))
        raise ConfigError(
            f"feature {name!r}, row {row}: {lengths_B[row]} ids in one bag, but its hotness is {hotness}; "
            "raise the feature's hotness or shorten the bag"
        )
    slots_Bxh = np.full((len(lengths_B), hotness), EMPTY_SLOT, values.dtype)
    slots_Bxh[np.arange(hotness) < lengths_B[:, None]] = values
    return slots_Bxh


def describe_nonfinite(batch: Batch, dense_names: tuple[str, ...] = ()) -> str:
    """Which column of a batch holds a NaN or an infinity, in words; used when a loss is not finite."""
    rows, columns = np.nonzero(~np.isfinite(np.asarray(batch.dense_BxN)))
    if len(rows):
        column = int(columns[0])
        name = dense_names[column] if column < len(dense_names) else f"dense {column}"
        value = np.asarray(batch.dense_BxN)[rows[0], column]
        return f"dense column {name!r} is {value} in row {int(rows[0])} of the batch"
    bad = np.nonzero(~np.isfinite(np.asarray(batch.label_B)))[0]
    if len(bad):
        return f"the label is {np.asarray(batch.label_B)[bad[0]]} in row {int(bad[0])} of the batch"
    return "no input column is NaN or infinite: the weights diverged; try a smaller --learning_rate or a warm-up"
