"""How an id becomes a row of a table: one function `(ids, number, rows of the table) -> row numbers` a name.

They work on NumPy's and JAX's arrays alike. docs/ADDING.md says how to add one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm_jax.config import Part
from dlrm_jax.host.registry import Registry

IdMap = Callable[[Any, int, int], Any]
ID_MAPS: Registry[IdMap] = Registry("id_map", "dlrm_jax.id_maps")
register = ID_MAPS.register


@register("same")
def same(ids: Any, number: int, rows: int) -> Any:
    """A row for every id."""
    del number, rows
    return ids


@register("quotient")
def quotient(ids: Any, number: int, rows: int) -> Any:
    """id // number: `number` neighbours share a row (arXiv:1909.02107)."""
    del rows
    return ids // number


@register("remainder")
def remainder(ids: Any, number: int, rows: int) -> Any:
    """id mod number: with the quotient, all that there is to know of an id."""
    del rows
    return ids % number


@register("hash")
def hashed(ids: Any, number: int, rows: int) -> Any:
    """A hash of the id, another for each `number`, mod rows."""
    bits = ids.astype("uint32") * np.uint32(0x9E3779B1) + np.uint32(number * 0x85EBCA77 % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return ((bits ^ (bits >> np.uint32(16))) % np.uint32(rows)).astype("int32")


def row_numbers(part: Part, rows: int, ids: Any) -> Any:
    """The rows of a part's table that ids mean; empty slots stay negative. ConfigError for an unknown id map."""
    if part.id_map == "same":
        return ids
    filled = (ids >= 0).astype(ids.dtype)
    return ID_MAPS.get(part.id_map)(ids * filled, part.number, rows) * filled - (1 - filled)
