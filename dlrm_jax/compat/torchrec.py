"""Weights of TorchRec's DLRM (torchrec/models/dlrm.py) under the names of the reference, which weights.py reads."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError

_TABLE = re.compile(r"sparse_arch\.embedding_bag_collection\.embedding_bags\.(.+)\.weight")
_BOTTOM = re.compile(r"dense_arch\.model\._mlp\.(\d+)\._linear\.(weight|bias)")
_TOP = re.compile(r"over_arch\.model\.0\._mlp\.(\d+)\._linear\.(weight|bias)")
_LAST = re.compile(r"over_arch\.model\.1\.(weight|bias)")


def from_torchrec(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state_dict of TorchRec's DLRM (arrays or CPU tensors, whole tables) under the reference's names.

    Tables keep their order. TorchRec lists the products of pairs by the upper triangle, the reference by the lower one:
    the columns of the top MLP's first layer are put in that order, so that logits are equal.

    Raises:
      ConfigError: for a name that its DLRM with the dot interaction does not have.
    """
    found: dict[str, np.ndarray] = {}
    tables, top = 0, 0
    for name, array in arrays.items():
        name = re.sub(r"^(module\.|model\.)+", "", name)
        values = np.asarray(array, np.float32)
        if _TABLE.fullmatch(name):
            found[f"emb_l.{tables}.weight"] = values
            tables += 1
        elif match := _BOTTOM.fullmatch(name):
            found[f"bot_l.{2 * int(match[1])}.{match[2]}"] = values
        elif match := _TOP.fullmatch(name):
            found[f"top_l.{2 * int(match[1])}.{match[2]}"] = values
            top = max(top, int(match[1]) + 1)
        elif not _LAST.fullmatch(name):
            raise ConfigError(f"cannot load {name!r}: it is not of TorchRec's DLRM with the dot interaction")
    for name, array in arrays.items():
        if match := _LAST.search(name):
            found[f"top_l.{2 * top}.{match[1]}"] = np.asarray(array, np.float32)
    if not tables or "bot_l.0.weight" not in found or "top_l.0.weight" not in found:
        raise ConfigError(f"not a state of TorchRec's DLRM: a table or an MLP is missing in {sorted(arrays)[:4]}")
    columns = _lower_from_upper(tables + 1, found["emb_l.0.weight"].shape[1])
    if found["top_l.0.weight"].shape[1] != len(columns):
        raise ConfigError(
            f"over_arch's first layer takes {found['top_l.0.weight'].shape[1]} numbers; {tables} tables and their "
            f"products of pairs are {len(columns)}"
        )
    found["top_l.0.weight"] = found["top_l.0.weight"][:, columns]
    return found


def _lower_from_upper(vectors: int, dim: int) -> np.ndarray:
    """Which of TorchRec's columns is each of the reference's: x first, then the pairs."""
    rows, columns = np.triu_indices(vectors, 1)
    place = np.zeros((vectors, vectors), np.int64)
    place[columns, rows] = np.arange(len(rows))
    return np.concatenate([np.arange(dim), dim + place[np.tril_indices(vectors, -1)]])
