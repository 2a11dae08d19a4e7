"""Settings of single tables: the text of the file that `--tables` names, which a run keeps in its configuration."""

import json
from typing import Any

from dlrm_jax.config import ConfigError, require, require_choice
from dlrm_jax.tables.dtypes import DTYPES
from dlrm_jax.tables.rules import check_rule

_KEYS: dict[str, tuple[str, Any]] = {
    "dim": ("embedding_dim", int),
    "dtype": ("dtype", str),
    "optimizer": ("optimizer", str),
    "rate": ("rate", (int, float)),
}
"""Key in the file -> (field of TableConfig, what its value must be)."""


def read_table_settings(text: str, known: set[str]) -> dict[str, dict[str, Any]]:
    """Fields of TableConfig by table, from {"tables": {NAME: {"dim": 8, "dtype": "bfloat16", "optimizer": "adam"}}}.

    `rate` is times the run's learning rate. ConfigError for a table that is not `known`, and for another key or value.
    """
    try:
        tables = json.loads(text)["tables"]
        settings = dict(tables.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        example = '{"tables": {"NAME": {"optimizer": "adam"}}}'
        raise ConfigError(f"--tables: the file cannot be read ({error!r}); write {example}") from error
    return {name: _checked(f"--tables: table {name!r}", name, values, known) for name, values in settings.items()}


def _checked(where: str, name: str, values: Any, known: set[str]) -> dict[str, Any]:
    some = ", ".join(sorted(known)[:5]) + (", ..." if len(known) > 5 else "")
    require(name in known, f"{where} is not in the data, which has {some}")
    require(isinstance(values, dict), f'{where} has {values!r}; write its settings, as {{"rate": 0.1}}')
    fields = {}
    for key, value in values.items():
        require(key in _KEYS, f"{where} has {key!r}; known are {', '.join(_KEYS)}")
        field, kind = _KEYS[key]
        require(isinstance(value, kind) and not isinstance(value, bool), f"{where}: {key} cannot be {value!r}")
        fields[field] = value
    if "dtype" in fields:
        require_choice(f"{where}: dtype", fields["dtype"], tuple(DTYPES.all()))
    if fields.get("optimizer"):
        check_rule(fields["optimizer"])
    return fields
