"""How unevenly ids occur: a power law over ranks, its exponent read off a dataset's statistics."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_FIT = (0.0, 3.0)
"""Exponents that are looked at."""


def expected_distinct(rows: int, draws: float, skew: float) -> float:
    """sum over ranks k of 1 - (1 - p_k)^draws, with p_k in proportion to k^-skew; ranks in geometric groups."""
    count, share = _shares(rows, skew)
    return float((count * -np.expm1(draws * np.log1p(-np.minimum(share, 1 - 1e-12)))).sum())


def _shares(rows: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """(ranks in each of some groups, the share of each rank in it)."""
    edges = np.unique(np.floor(np.geomspace(1, rows + 1, 400)).astype(np.int64))
    low, high = edges[:-1], edges[1:]
    weight = np.sqrt(low * (high - 1.0)) ** -skew
    return high - low, weight / (weight * (high - low)).sum()


def fitted_skew(rows: int, top_share: float) -> float:
    """The exponent under which the most frequent of `rows` ids has `top_share` of the draws; by bisection."""
    low, high = _FIT
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _shares(rows, middle)[1][0] < top_share else (low, middle)
    return low


def skews(statistics: Mapping[str, Any]) -> dict[str, float]:
    """The exponent of each table, from a prepared dataset's statistics.json."""
    tables = statistics.get("tables", {})
    return {
        name: fitted_skew(table["distinct"], table["top"][0]["share"])
        for name, table in tables.items()
        if table.get("top") and table.get("distinct", 0) > 1
    }
