"""Weights of the reference: its state_dict as a TrainState, and back.

Weights cross as a dict of arrays under the reference's state_dict names: `emb_l.k.weight` (rows, D), `bot_l.j.weight`
(out, in), `bot_l.j.bias`, `top_l.*`, and `v_W_l.k` (rows,) where pooling weights are learned. Of a quotient-remainder
table they are `emb_l.k.weight_q` and `_r`, of mixed dimensions `emb_l.k.embs.weight` and `.proj.weight` (D, columns).
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import (
    PLAIN,
    ConfigError,
    FeatureConfig,
    InteractionConfig,
    ModelConfig,
    OptimizerConfig,
    Part,
    ScheduleConfig,
    TableConfig,
    nested_interaction,
)
from dlrm_jax.tables.by_name import named_tables, stack_tables
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.state import TrainState, new_state

_WEIGHT_NAME = re.compile(
    r"emb_l\.\d+\.(weight(_[qr])?|(embs|proj)\.weight)|v_W_l\.\d+|(bot|top)_l\.\d+\.(weight|bias)"
)
OPERATIONS = {"mult": "mul", "add": "sum", "concat": "concat"}


def infer_model(
    arrays: Mapping[str, Any], hotness: tuple[int, ...] = (), qr_operation: str = "mult", **options: Any
) -> ModelConfig:
    """The shape of the model that a reference state_dict holds; tables are named `table_0`, `table_1`, ...

    Args:
      hotness: id slots of each feature, default 1.
      qr_operation: how quotient and remainder vectors become one, where there are any: mult, add or concat.
      **options: further settings that weights do not show, as `interaction` and `self_interaction`.
    """
    _refuse_unknown(arrays)
    count = num_features(arrays)
    if not count or "bot_l.0.weight" not in arrays or "top_l.0.weight" not in arrays:
        raise ConfigError(f"not a reference DLRM state: emb_l.*, bot_l.* or top_l.* missing in {sorted(arrays)[:8]}")
    hotness = hotness or (1,) * count
    tables: list[TableConfig] = []
    features = []
    for k in range(count):
        tables += [TableConfig(name, *np.shape(arrays[theirs])) for name, theirs in _tables_of(arrays, k).items()]
        features.append(_feature(arrays, k, hotness[k], OPERATIONS[qr_operation]))
    options = nested_interaction(options)
    options["interaction"] = InteractionConfig(**options["interaction"])
    return ModelConfig(
        num_dense=np.shape(arrays["bot_l.0.weight"])[1],
        tables=tuple(tables),
        features=tuple(features),
        bottom_mlp=tuple(len(arrays[name]) for name in _layers(arrays, "bot_l")),
        top_mlp=tuple(len(arrays[name]) for name in _layers(arrays, "top_l")),
        learned_pooling="v_W_l.0" in arrays,
        **options,
    )


def num_features(arrays: Mapping[str, Any]) -> int:
    """How many features a reference state_dict has."""
    return len({name.split(".")[1] for name in arrays if name.startswith("emb_l.")})


def _tables_of(arrays: Mapping[str, Any], k: int) -> dict[str, str]:
    """Our names of the tables of feature k, and the reference's."""
    named = {
        f"table_{k}": (f"emb_l.{k}.weight", f"emb_l.{k}.embs.weight"),
        f"table_{k}/quotient": (f"emb_l.{k}.weight_q",),
        f"table_{k}/remainder": (f"emb_l.{k}.weight_r",),
    }
    return {ours: theirs for ours, all_theirs in named.items() for theirs in all_theirs if theirs in arrays}


def _feature(arrays: Mapping[str, Any], k: int, hotness: int, combine: str) -> FeatureConfig:
    if f"emb_l.{k}.weight_q" not in arrays:
        return FeatureConfig(f"feature_{k}", f"table_{k}", hotness)
    quotients, collisions = (len(arrays[f"emb_l.{k}.weight_{part}"]) for part in "qr")
    parts = tuple(Part(f"table_{k}/{kind}", kind, collisions) for kind in ("quotient", "remainder"))
    num_ids = quotients * collisions  # At most: the reference's weights do not show where its last quotient ends.
    return FeatureConfig(f"feature_{k}", f"table_{k}", hotness, parts=parts, combine=combine, num_ids=num_ids)


def load_reference_state(
    arrays: Mapping[str, Any], optimizer: OptimizerConfig | None = None, qr_operation: str = "mult"
) -> TrainState:
    """A reference state_dict (NumPy arrays or CPU tensors) as a TrainState at step 0 with fresh optimizer state.

    Raises ConfigError for arrays of a kind that this model has not.
    """
    optimizer = optimizer or OptimizerConfig(ScheduleConfig(learning_rate=0.1))
    model = infer_model(arrays, qr_operation=qr_operation)
    dense_params: dict[str, Any] = {
        ours: {
            f"layer_{i}": {
                "kernel": jnp.asarray(np.asarray(arrays[name], np.float32).T),
                "bias": jnp.asarray(np.asarray(arrays[name.replace("weight", "bias")], np.float32)),
            }
            for i, name in enumerate(_layers(arrays, theirs))
        }
        for ours, theirs in (("bottom_mlp", "bot_l"), ("top_mlp", "top_l"))
    }
    named = {}
    for k in range(len(model.features)):
        for ours, theirs in _tables_of(arrays, k).items():
            named[ours] = np.asarray(arrays[theirs], np.float32)
        if model.learned_pooling:
            named[f"table_{k}{POOLING_WEIGHTS}"] = np.asarray(arrays[f"v_W_l.{k}"], np.float32).reshape(-1, 1)
        if f"emb_l.{k}.proj.weight" in arrays:
            matrix = jnp.asarray(np.asarray(arrays[f"emb_l.{k}.proj.weight"], np.float32).T)
            index = [table.name for table in model.tables].index(f"table_{k}")
            dense_params.setdefault("vectors", {})[f"table_{index}"] = matrix
    return new_state(model, optimizer, dense_params, stack_tables(model, named))


def save_reference_state(model: ModelConfig, state: TrainState) -> dict[str, np.ndarray]:
    """The inverse of `load_reference_state`: arrays under the reference's names, in table order of `model`."""
    if model.interaction.name not in ("dot", "cat") or not model.num_dense:
        what = f"{model.interaction.name} interaction" if model.num_dense else "model without numbers"
        raise ConfigError(f"the reference has no {what}, so this state has no names there")
    if model.embedded:
        raise ConfigError("the reference has no embedded numbers, so this state has no names there")
    for hidden in (model.bottom_hidden, model.top_hidden):
        if (hidden.activation, hidden.norm) != (PLAIN.activation, PLAIN.norm):
            raise ConfigError(f"the reference's hidden layers are products and ReLUs, not {hidden}")
    arrays = {}
    ends = {part.table: f"weight_{part.id_map[0]}" for feature in model.features for part in feature.parts}
    # Where one table of the reference is of mixed dimensions, all are.
    plain = "embs.weight" if "vectors" in state.dense_params else "weight"
    index = {lookup.part.table: lookup.feature for lookup in model.lookups}
    for name, rows in named_tables(model, state.tables):
        if name.endswith(POOLING_WEIGHTS):
            arrays[f"v_W_l.{index[name.removesuffix(POOLING_WEIGHTS)]}"] = np.asarray(rows)[:, 0]
        else:
            arrays[f"emb_l.{index[name]}.{ends.get(name, plain)}"] = np.asarray(rows)
    for name, matrix in state.dense_params.get("vectors", {}).items():
        table = model.tables[int(name.removeprefix("table_"))].name
        arrays[f"emb_l.{index[table]}.proj.weight"] = np.asarray(matrix).T
    for ours, theirs in (("bottom_mlp", "bot_l"), ("top_mlp", "top_l")):
        for i in range(len(state.dense_params[ours])):
            layer = state.dense_params[ours][f"layer_{i}"]
            arrays[f"{theirs}.{2 * i}.weight"] = np.asarray(layer["kernel"]).T
            arrays[f"{theirs}.{2 * i}.bias"] = np.asarray(layer["bias"])
    return arrays


def _refuse_unknown(arrays: Mapping[str, Any]) -> None:
    unknown = sorted(name for name in arrays if not _WEIGHT_NAME.fullmatch(name))
    if unknown:
        raise ConfigError(
            f"cannot load {unknown[0]!r}: known are embedding tables, plain, quotient-remainder and of mixed "
            "dimensions, pooling weights and MLPs"
        )


def _layers(arrays: Mapping[str, Any], prefix: str) -> list[str]:
    """Names of an MLP's weights in order; a Sequential numbers its activations too, hence the gaps."""
    names = [name for name in arrays if re.fullmatch(prefix + r"\.\d+\.weight", name)]
    return sorted(names, key=lambda name: int(name.split(".")[1]))
