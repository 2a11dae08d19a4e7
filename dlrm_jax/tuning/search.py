"""A search over flags, as its file says: the trials, and the rounds in which they are thinned out.

Both are functions of the file and the seed alone, so that a search that was killed goes on with the same trials.

Successive halving (arXiv:1502.07943) of 9 trials with factor 3 and 900 steps: 9 trials train to step 100, the best 3 of
them go on to 300, the best of these to 900.
"""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError, check_settings, from_dict, require, setting
from dlrm_jax.config.documents import from_yaml

METHODS = ("grid", "random", "halving")
_MOST_TRIALS = 10_000


@dataclasses.dataclass(frozen=True)
class Range:
    """Values of a flag between `low` and `high`, evenly, or by their logarithm; whole numbers where `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, generator: np.random.Generator) -> str:
        """A value as a flag's text."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(generator.uniform(low, high))
        value = math.exp(value) if self.log else value
        return str(round(value)) if self.whole else f"{value:.6g}"


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched: for each flag a list of values or a range; `num_trials` for random and halving."""

    method: str = setting("random", "How trials are chosen.", choices=METHODS)
    num_trials: int = setting(16, "Trials of random and halving.", at_least=1)
    factor: int = setting(3, "halving: of how many trials one goes on.", at_least=2)
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: how many trials take part, and the share of all steps that they have taken at its end."""

    num_trials: int
    share: float


def read_search(path: pathlib.Path) -> Search:
    """The search that a YAML or JSON file describes; ConfigError for what is none.

    A flag's values are a list, or {low, high} with log and whole.
    """
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ConfigError(f"--search={path}: {reason}") from error
    where = f"--search={path}"
    search: Search = from_dict(Search, values, where)
    require(bool(search.flags), f"{where}: flags is empty; write each with its values, as learning_rate: [0.01, 0.1]")
    checked = {name: _values(value, f"{where}: flags: {name}") for name, value in search.flags.items()}
    search = dataclasses.replace(search, flags=checked)
    ranges = sorted(name for name, value in checked.items() if isinstance(value, Range))
    require(
        search.method != "grid" or not ranges, f"{where}: a grid has lists of values; {', '.join(ranges)} is a range"
    )
    sizes = [len(values) for values in checked.values() if isinstance(values, tuple)]
    count = math.prod(sizes) if search.method == "grid" else search.num_trials
    require(count <= _MOST_TRIALS, f"{where}: {count:,} trials; at most {_MOST_TRIALS:,}")
    return search


def _values(value: Any, where: str) -> tuple[str, ...] | Range:
    if isinstance(value, dict):
        found: Range = from_dict(Range, value, where)
        require(
            (0 if found.log else -math.inf) < found.low < found.high < math.inf,
            f"{where}: from {found.low:g} to {found.high:g}; give low below high{', above 0' if found.log else ''}",
        )
        return found
    require(isinstance(value, list) and bool(value), f"{where} is {value!r:.100}; give a list, or low and high")
    return tuple(_text(one, where) for one in value)


def _text(value: Any, where: str) -> str:
    """A value as a flag's text; a list is that of numbers which a flag takes."""
    if isinstance(value, list):
        return ",".join(_text(one, where) for one in value)
    require(isinstance(value, str | int | float), f"{where}: {value!r:.100} is no value of a flag")
    return str(value).lower() if isinstance(value, bool) else str(value)


def trials(search: Search, seed: int) -> list[dict[str, str]]:
    """The flags of each trial."""
    if search.method == "grid":
        return [dict(zip(search.flags, values, strict=True)) for values in itertools.product(*search.flags.values())]
    generator = np.random.default_rng(seed)
    return [
        {
            name: values.draw(generator) if isinstance(values, Range) else values[generator.integers(len(values))]
            for name, values in search.flags.items()
        }
        for _ in range(search.num_trials)
    ]


def rounds(search: Search, num_trials: int) -> list[Round]:
    """The rounds of a search: one but for halving, where each keeps 1 / factor of the trials, down to one."""
    if search.method != "halving":
        return [Round(num_trials, 1.0)]
    counts = [num_trials]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // search.factor))
    return [Round(count, search.factor ** -(len(counts) - 1.0 - i)) for i, count in enumerate(counts)]


def best(values: dict[int, float | None], count: int, smaller_is_better: bool) -> list[int]:
    """The `count` best trials by their values, first the best; of equal ones the earlier. Failed ones are none."""
    known = {trial: value for trial, value in values.items() if value is not None and not math.isnan(value)}
    sign = 1 if smaller_is_better else -1
    return sorted(known, key=lambda trial: (sign * known[trial], trial))[:count]
