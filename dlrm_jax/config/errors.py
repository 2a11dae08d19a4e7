"""What is said of a setting or an input that cannot be, and the checks that say it."""

import collections


class ConfigError(ValueError):
    """A setting or an input that the user can mend; commands print it as one line, without traceback."""


def how_to_install(extra: str, upgrade: bool = False) -> str:
    """The command for one of pyproject.toml's extras: the package is on no index, so it is typed in a checkout."""
    return f'pip install {"--upgrade " if upgrade else ""}".[{extra}]" in the checkout of dlrm_jax'


def require(condition: bool, message: str) -> None:
    """ConfigError with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


def require_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """ConfigError naming the choices if `value` is none of them."""
    require(value in choices, f"{what} is {value!r}; choose one of {', '.join(choices)}")


def require_unique(what: str, names: list[str]) -> None:
    """ConfigError naming what is repeated."""
    repeated = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    require(not repeated, f"{what} names must be unique; repeated: {', '.join(repeated)}")
