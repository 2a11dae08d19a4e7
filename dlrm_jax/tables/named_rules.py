"""Rules of tables (rules.py) by what a user calls them: `NAME,option=value,...`."""

import dataclasses
from typing import Any

from dlrm_jax.config import ConfigError, OptimizerConfig, require
from dlrm_jax.tables.rules import RULES, Adagrad, Bounded, RowwiseAdagrad, Rule


def help_text() -> str:
    """The rules there are, each with its options."""
    options = {name: ", ".join(field.name for field in dataclasses.fields(rule)) for name, rule in RULES.all().items()}
    return "; ".join(f"{name} ({text})" if text else name for name, text in options.items())


def make_rule(config: OptimizerConfig, described: str = "") -> Rule:
    """The rule of `described`, `NAME` or `NAME,option=value,...`, by default the run's, with the run's bounds.

    Raises ConfigError for a name or an option that is not known, and for a value of another kind.
    """
    rule = _parsed(described or config.table, config.eps)
    bounds = {name: getattr(config, f"table_{name}") for name in ("l2", "clip_norm", "weight_decay", "max_norm")}
    bounds["clip_value"] = config.clip_value
    return Bounded(rule, **bounds) if any(bounds.values()) else rule


def _parsed(described: str, eps: float) -> Rule:
    name, *options = described.split(",")
    kind = RULES.get(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {"eps": eps} if issubclass(kind, Adagrad | RowwiseAdagrad) else {}
    for option in options:
        key, _, text = option.partition("=")
        known = ", ".join(fields) or "none"
        require(key in fields, f"table_optimizer {described!r}: {name} has no option {key!r}; its options: {known}")
        if isinstance(fields[key].default, str):
            values[key] = text
            continue
        try:
            values[key] = float(text)
        except ValueError:
            raise ConfigError(f"table_optimizer {described!r}: {key} is {text!r}; it must be a number") from None
        require(0 <= values[key] < float("inf"), f"table_optimizer {described!r}: {key} must be 0 or more, and finite")
    return kind(**values)


def check_rule(described: str) -> None:
    """ConfigError for a rule of unknown name or options."""
    _parsed(described, 1e-10)
