"""Ids of a chosen reuse: the stack-distance model of the reference (dlrm_data_pytorch.py), and its file format.

Ids lie on a stack. Stack distance d > 0 takes the d-th id from the top (1: the last one used), 0 one not used yet.
A distribution file has three lines of numbers separated by ", ": the ids by first access, the stack distances that
occur in ascending order, and their cumulative probabilities.
"""

import dataclasses
import itertools
import pathlib

import numpy as np

from dlrm_jax.config import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How a trace reuses its ids: `cumulative[i]` is the probability of a distance of at most `distances[i]`."""

    accesses: tuple[int, ...]
    distances: tuple[int, ...]
    cumulative: tuple[float, ...]


def generate(distribution: Distribution, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` ids whose reuse follows `distribution`; int64.

    While few ids have been used, distances beyond them are left out and the rest scaled up, as the reference does.
    """
    stack = list(distribution.accesses)
    distances, cumulative = np.asarray(distribution.distances), np.asarray(distribution.cumulative)
    size, used, greatest = len(stack), 0, int(distances[-1])
    out = np.empty(count, np.int64)
    for n, u in enumerate(rng.random(count).tolist()):
        if used < greatest:
            u *= cumulative[max(int(np.searchsorted(distances, used, side="right")) - 1, 0)]
        distance = int(distances[min(int(np.searchsorted(cumulative, u)), len(distances) - 1)])
        if distance == 0:
            i = stack.pop(0)
            used += 1
        else:
            i = stack.pop(max(size - distance, 0))
        stack.append(i)
        out[n] = i
    return out


def read_distribution(path: str) -> Distribution:
    """A distribution file; ConfigError naming the line that is none."""
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    require(len(lines) >= 3, f"{path} has {len(lines)} lines; a distribution has three: ids, distances, probabilities")
    accesses, distances = _numbers(path, 1, lines[0], int), _numbers(path, 2, lines[1], int)
    cumulative = _numbers(path, 3, lines[2], float)
    require(
        len(distances) == len(cumulative), f"{path}: {len(distances)} distances but {len(cumulative)} probabilities"
    )
    ascending = all(a < b for a, b in itertools.pairwise(distances)) and sorted(cumulative) == list(cumulative)
    require(ascending, f"{path}: distances and cumulative probabilities must ascend")
    require(min(accesses) >= 0 and distances[0] >= 0, f"{path}: ids and distances must not be negative")
    require(distances[-1] <= len(accesses), f"{path}: distance {distances[-1]} is beyond its {len(accesses)} ids")
    require(len(set(accesses)) == len(accesses), f"{path}, line 1: an id stands twice")
    require(0 < cumulative[-1] < 1 + 1e-6, f"{path}, line 3: the last probability is {cumulative[-1]}; it must be 1")
    return Distribution(accesses, distances, cumulative)


def _numbers(path: str, line: int, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(", "))
    except ValueError:
        raise ConfigError(f'{path}, line {line}: not numbers separated by ", "') from None
