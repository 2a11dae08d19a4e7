"""Settings of single tables: the text of the file that `--tables` names, which a run keeps in its configuration."""

import dataclasses
from typing import Any

from dlrm_jax.config import ConfigError, from_dict, require, require_choice
from dlrm_jax.config.documents import from_json
from dlrm_jax.tables.dtypes import DTYPES
from dlrm_jax.tables.named_rules import check_rule


@dataclasses.dataclass(frozen=True)
class TableSettings:
    """What the file may say of a table; `rate` is times the run's learning rate."""

    dim: int = 0
    dtype: str = ""
    optimizer: str = ""
    rate: float = 1.0


_FIELDS = {"dim": "embedding_dim"}
"""Name in the file -> field of TableConfig, where they differ."""


def read_table_settings(text: str) -> dict[str, dict[str, Any]]:
    """Fields of TableConfig by table, from {"tables": {NAME: {"dim": 8, "dtype": "bfloat16", "optimizer": "adam"}}}.

    Nothing of none where `text` is empty. ConfigError for a name that is unknown, and for a value that cannot be.
    """
    if not text:
        return {}
    try:
        tables = from_json(text)["tables"]
        said = dict(tables.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        example = '{"tables": {"NAME": {"optimizer": "adam"}}}'
        raise ConfigError(f"--tables: the file cannot be read ({error!r}); write {example}") from error
    return {name: _fields(name, values) for name, values in said.items()}


def _fields(name: str, values: Any) -> dict[str, Any]:
    settings = from_dict(TableSettings, values, f"--tables: table {name!r}")
    if settings.dtype:
        require_choice(f"--tables: table {name!r}: dtype", settings.dtype, tuple(DTYPES.all()))
    if settings.optimizer:
        check_rule(settings.optimizer)
    return {_FIELDS.get(key, key): getattr(settings, key) for key in values}


def require_known(own: dict[str, Any], known: set[str]) -> None:
    """ConfigError for a table in the file that the data does not have."""
    some = ", ".join(sorted(known)[:5]) + (", ..." if len(known) > 5 else "")
    for name in own:
        require(name in known, f"--tables: table {name!r} is not in the data, which has {some}")
