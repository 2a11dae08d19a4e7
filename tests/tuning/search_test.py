"""Tests `dlrm_jax/tuning/search.py`: which trials there are, how many go on, which is best."""

import dataclasses
import itertools
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.tuning.search import Search, best, read_search, rounds, trials


def read(tmp_path, values) -> Search:
    path = tmp_path / "search.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return read_search(path)


def test_a_grid_is_every_combination(tmp_path):
    flags = {"learning_rate": [0.1, 1e-3], "top_mlp": [[8, 1], [1]], "shuffle": [True]}
    found = trials(read(tmp_path, {"method": "grid", "flags": flags}), seed=0)
    assert found == [
        {"learning_rate": rate, "top_mlp": mlp, "shuffle": "true"} for rate in ("0.1", "0.001") for mlp in ("8,1", "1")
    ]


def test_random_trials_lie_in_their_ranges_and_follow_from_the_seed(tmp_path):
    ranges = {
        "a": {"low": 1e-5, "high": 1, "log": True},
        "b": {"low": -1, "high": 1},
        "c": {"low": 2, "high": 9, "whole": True},
        "d": ["x", "y"],
    }
    search = read(tmp_path, {"num_trials": 200, "flags": ranges})
    found = trials(search, 3)
    assert found == trials(search, 3) != trials(search, 4)
    for name, least, most in (("a", 1e-5, 1), ("b", -1, 1), ("c", 2, 9)):
        assert all(least <= float(trial[name]) <= most for trial in found)
    assert 60 < sum(float(trial["a"]) < 10**-2.5 for trial in found) < 140, "half of the decades, half of the trials"
    assert {trial["c"] for trial in found} == set("23456789") and {trial["d"] for trial in found} == {"x", "y"}


@given(st.integers(1, 500), st.integers(2, 5))
def test_halving_keeps_a_share_of_the_trials_and_ends_with_one_whole_run(count, factor):
    found = rounds(Search("halving", factor=factor), count)
    assert found[0].num_trials == count and (found[-1].num_trials, found[-1].share) == (1, 1.0)
    for before, after in itertools.pairwise(found):
        assert after.num_trials == math.ceil(before.num_trials / factor)
        assert after.share == pytest.approx(before.share * factor)
    assert [one.share for one in rounds(dataclasses.replace(Search(), method="random"), count)] == [1.0]


@pytest.mark.parametrize(("smaller", "order"), [(False, [1, 3, 0]), (True, [0, 3, 1])])
def test_the_best_come_first_and_failed_ones_never(smaller, order):
    values = {0: 0.5, 1: 0.7, 2: math.nan, 3: 0.6, 4: None}
    assert best(values, 5, smaller) == order
    assert best({1: 0.5, 0: 0.5}, 1, smaller) == [0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("a: [", "while parsing"),
        ("a: &a [x]\nb: *a", "has an alias"),
        ("[]", r"is \[\]; expected names with values"),
        ({"flags": {}}, "flags is empty; write each with its values"),
        ({"method": "hyperband"}, "method is 'hyperband'; choose one of grid, random, halving"),
        ({"num_trials": 0}, "num_trials is 0; it must be at least 1"),
        ({"flag": {}}, "unknown flag; known are method"),
        ({"flags": {"a": 5}}, "flags: a is 5; give a list, or low and high"),
        ({"flags": {"a": []}}, r"flags: a is \[\]; give a list"),
        ({"flags": {"a": [None]}}, "flags: a: None is no value of a flag"),
        ({"flags": {"a": {"low": 2, "high": 1}}}, "from 2 to 1; give low below high"),
        ({"flags": {"a": {"low": 0, "high": 1, "log": True}}}, "give low below high, above 0"),
        ({"flags": {"a": {"low": 0}}}, "flags: a: high is missing"),
        ({"method": "grid", "flags": {"a": {"low": 0, "high": 1}}}, "a grid has lists of values; a is a range"),
        ({"method": "grid", "flags": {key: list(range(10)) for key in "abcde"}}, "100,000 trials; at most 10,000"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(tmp_path, values, words):
    with pytest.raises(ConfigError, match=words) as error:
        read(tmp_path, values)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        read_search(tmp_path / "nowhere.yaml")
