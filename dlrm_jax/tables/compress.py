"""Fewer numbers for the same ids: ways to store large tables, as functions from one ModelConfig to another.

    qr           an id's quotient and remainder by `collisions` are looked up in two tables (arXiv:1909.02107)
    mixed        tables of rare rows are narrow, and projected where they meet (arXiv:1909.11810)
    modulo       ids share `rows` rows by their remainder
    two_hashes   an id is the sum of two hashed rows of one table (arXiv:1709.03933)

A way concerns tables of more than `threshold` rows. docs/ADDING.md says how to add one.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError, FeatureConfig, ModelConfig, Part, TableConfig, require, require_choice
from dlrm_jax.host.registry import Registry

Way = Callable[..., ModelConfig]
WAYS: Registry[Way] = Registry("compress_tables", "dlrm_jax.table_compressions")
register = WAYS.register


def help_text() -> str:
    """The ways there are, with their options and defaults."""
    return "; ".join(
        f"{name} ({', '.join(f'{k}={v}' for k, v in _options(way).items())})" for name, way in WAYS.all().items()
    )


def _options(way: Way) -> dict[str, Any]:
    return {name: p.default for name, p in list(inspect.signature(way).parameters.items())[1:]}


def compressed(model: ModelConfig, described: str) -> ModelConfig:
    """The model by `NAME,option=value,...`; itself where empty. ConfigError for what is not known or cannot be."""
    if not described:
        return model
    name, *options = described.split(",")
    way = WAYS.get(name)
    defaults, values = _options(way), {}
    for option in options:
        key, _, text = option.partition("=")
        known = ", ".join(defaults)
        require(key in defaults, f"compress_tables={described}: {name} has no option {key!r}; its options: {known}")
        try:
            values[key] = type(defaults[key])(text)
        except ValueError:
            raise ConfigError(f"compress_tables={described}: {key} is {text!r}; it must be a number") from None
        positive = not isinstance(values[key], int | float) or 0 <= values[key] < float("inf")
        require(positive, f"compress_tables={described}: {key} is {text}; it must not be negative")
    return way(model, **values)


@register("qr")
def quotient_remainder(
    model: ModelConfig, threshold: int = 200, collisions: int = 4, combine: str = "mul", init: str = "zero_mean"
) -> ModelConfig:
    """Two tables of ceil(n / collisions) and of `collisions` rows for one of n; of half its columns by concat.

    Initial weights are uniform around 0, such that the combined vector has the variance 1 / (3 n) of a plain table's;
    `init=dlrm` draws them from (sqrt(1 / n), 1), as the reference does.
    """
    require(collisions >= 1, f"compress_tables: collisions is {collisions}; it must be at least 1")
    require_choice("compress_tables: combine", combine, ("sum", "mul", "concat"))
    require_choice("compress_tables: init", init, ("zero_mean", "dlrm"))
    half = {"sum": lambda n: (1 / (2 * n)) ** 0.5, "mul": lambda n: (3 / n) ** 0.25, "concat": lambda n: (1 / n) ** 0.5}

    def split(table: TableConfig) -> tuple[list[TableConfig], tuple[Part, ...]]:
        rows = table.num_embeddings
        bounds = (-half[combine](rows), half[combine](rows)) if init == "zero_mean" else ((1 / rows) ** 0.5, 1.0)
        sizes = {"quotient": -(-rows // collisions), "remainder": collisions}
        dim = table.embedding_dim // 2 if combine == "concat" else table.embedding_dim
        require(combine != "concat" or table.embedding_dim % 2 == 0, "compress_tables: concat needs an even dim")
        tables = [
            dataclasses.replace(
                table, name=f"{table.name}/{kind}", num_embeddings=size, embedding_dim=dim, init_range=bounds
            )
            for kind, size in sizes.items()
        ]
        return tables, tuple(Part(f"{table.name}/{kind}", kind, collisions) for kind in sizes)

    return _replaced(model, threshold, split, combine)


@register("modulo")
def modulo(model: ModelConfig, threshold: int = 200, rows: int = 200) -> ModelConfig:
    """Tables of `rows` rows, which ids share by their remainder."""
    require(rows >= 1, f"compress_tables: rows is {rows}; it must be at least 1")
    return _replaced(model, max(threshold, rows), lambda table: _fewer(table, rows, [("remainder", rows)]), "sum")


@register("two_hashes")
def two_hashes(model: ModelConfig, threshold: int = 200, rows: int = 200) -> ModelConfig:
    """Tables of `rows` rows, of which an id is the sum of two, by two hashes: few ids share both."""
    require(rows >= 1, f"compress_tables: rows is {rows}; it must be at least 1")
    return _replaced(model, max(threshold, rows), lambda table: _fewer(table, rows, [("hash", 1), ("hash", 2)]), "sum")


def _fewer(table: TableConfig, rows: int, maps: list[tuple[str, int]]) -> tuple[list[TableConfig], tuple[Part, ...]]:
    return [dataclasses.replace(table, num_embeddings=rows)], tuple(Part(table.name, *id_map) for id_map in maps)


def _replaced(
    model: ModelConfig,
    threshold: int,
    split: Callable[[TableConfig], tuple[list[TableConfig], tuple[Part, ...]]],
    combine: str,
) -> ModelConfig:
    """The model with each table of more than `threshold` rows as `split` says, and its features' parts."""
    tables: list[TableConfig] = []
    parts: dict[str, tuple[Part, ...]] = {}
    for table in model.tables:
        if table.num_embeddings <= threshold:
            tables.append(table)
            continue
        new, parts[table.name] = split(table)
        tables += new

    def feature(old: FeatureConfig) -> FeatureConfig:
        if old.table not in parts:
            return old
        return dataclasses.replace(old, parts=parts[old.table], combine=combine, num_ids=model.num_ids(old))

    return dataclasses.replace(model, tables=tuple(tables), features=tuple(map(feature, model.features)))


@register("mixed")
def mixed_dimensions(
    model: ModelConfig, threshold: int = 200, temperature: float = 0.3, round_dims: int = 1
) -> ModelConfig:
    """Dims that fall with a table's rows n: D (n / n_0)^-temperature, n_0 the fewest (arXiv:1909.11810, section 3).

    `round_dims` rounds to powers of two. Of the reference's md_solver; that crashes where a table is not above
    `threshold` and with rounding, here such a table keeps D.
    """
    dims = mixed_dims(
        [table.num_embeddings for table in model.tables], model.embedding_dim, temperature, bool(round_dims)
    )
    tables = tuple(
        table if table.num_embeddings <= threshold else dataclasses.replace(table, embedding_dim=dim)
        for table, dim in zip(model.tables, dims, strict=True)
    )
    return dataclasses.replace(model, tables=tables)


def mixed_dims(rows: list[int], dim: int, temperature: float, round_dims: bool) -> list[int]:
    """The reference's md_solver: the table of fewest rows has `dim` columns, others fewer, at least one."""
    sizes = np.array(rows, np.float64)
    least = int(np.argmin(sizes))
    wide = np.maximum(1, dim * sizes[least] ** temperature * sizes**-temperature)
    if round_dims:
        wide = 2 ** np.round(np.log2(wide))
    wide = np.minimum(np.round(wide), dim)
    wide[least] = dim
    return [int(d) for d in wide]
