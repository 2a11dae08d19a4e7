"""The label that infer finds, and what it says where only a person can tell."""

import os
import subprocess
import sys

import pytest
import yaml

from dlrm_jax.config import ConfigError
from dlrm_jax.data.infer.column import make_column
from dlrm_jax.data.infer.label import find_label
from dlrm_jax.data.schema.schema import Label
from dlrm_jax.data.schema.schema_io import from_dict
from tests.helpers import ROOT


def found(reasons: list[str] | None = None, **columns: list) -> Label:
    return find_label(
        [make_column(name, values) for name, values in columns.items()], [] if reasons is None else reasons
    )


@pytest.mark.parametrize(
    ("negative", "positive"),
    [
        ("negative", "positive"),
        ("no", "yes"),
        ("No", "YES"),
        ("n", "y"),
        ("F", "T"),
        ("False", "True"),
        ("noclick", "click"),
        ("no click", "click"),
        ("not_clicked", "clicked"),
        ("Unclicked", "Clicked"),
        ("non-buyer", "buyer"),
        ("impression", "click"),
    ],
)
def test_known_pairs_of_words(negative, positive):
    reasons: list[str] = []
    assert found(reasons, user=["a", "b"] * 3, label=[negative, positive] * 3) == Label("label", positive=(positive,))
    assert found(user=["a", "b"] * 3, label=[positive, negative] * 3) == Label("label", positive=(positive,))
    assert f"{positive!r} is positive, please check" in reasons[0]


def test_ways_to_write_one_word_are_one():
    assert found(label=["yes", "Yes", " YES", "no", "No"]) == Label("label", positive=("YES", "Yes", "yes"))


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ([0, 1, 1], Label("click")),
        (["0", "1", " 1"], Label("click")),
        ([0.0, 1.0], Label("click")),
        ([True, False, None], Label("click")),
        ([-1, 1], Label("click", threshold=0.0)),
    ],
)
def test_numbers_and_booleans(values, label):
    assert found(click=values) == label


@pytest.mark.parametrize("name", ["isClick", "Is Clicked", "CLICK", "Converted", "is-click"])
def test_names_in_any_spelling(name):
    assert found(a=[0, 1] * 3, b=[0, 1] * 3, **{name: [0, 1] * 3}) == Label(name)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"click": [0] * 9}, "column click is called like a label, but its first 9 rows hold only 0"),
        ({"click": [1.0] * 9}, "its first 9 rows hold only 1"),
        ({"click": [0, 1, 2, 3]}, "holds 4 numbers (0, 1, 2, 3); if those from some number on are positive, write in"),
        ({"click": [0, 1, 2, 3]}, "label: {column: click, threshold: 3}"),
        ({"click": [[1], [2]]}, "column click is called like a label, but holds lists"),
        ({"click": ["a"] * 3}, "holds only 'a' (3)"),
        ({"click": [None, None]}, "column click is called like a label, but has no values"),
        ({"click": ["a", "b", "c"]}, "holds 3 texts: 'a' (1), 'b' (1), 'c' (1); name the positive ones"),
        ({"click": ["bought", "left"]}, "label: {column: click, positive: ['bought']} or label: {column: click, "),
        ({"y": [0.5, 0.7], "flag": [0, 1]}, "flag hold 0 and 1 (label: flag)"),
        ({"spam": [0] * 9, "c": ["a", "b", "c"] * 3}, "or holds both 0 and 1 and nothing else (spam only '0')"),
        ({"income": ["<=50K", ">50K"], "c": ["a", "b"]}, "(income only '<=50K' and '>50K', c only 'a' and 'b')"),
        ({"q": [3, 4], "a": [0, 1], "b": [0, 1]}, "2 columns hold 0 and 1 (a, b)"),
    ],
)
def test_what_only_a_person_can_tell(columns, words):
    with pytest.raises(ConfigError) as error:
        found(**columns)
    assert words in str(error.value) and str(error.value).startswith("cannot tell the label: ")
    assert "no column is called" not in str(error.value) or not {"click", "y"} & columns.keys()


def test_what_the_error_says_to_write_is_a_schema():
    with pytest.raises(ConfigError) as error:
        found(label=["purchased", "bounced", "bounced"])
    ways = [part.split("}")[0] + "}" for part in str(error.value).split("label: {")[1:]]
    schemas = [from_dict(yaml.safe_load(f"{{name: x, sparse: [c], label: {{{way}}}")) for way in ways]
    assert [schema.label.positive for schema in schemas] == [("bounced",), ("purchased",)]


@pytest.mark.end_to_end
def test_hash_seeds_change_nothing(tmp_path):
    """And the same command again goes on, or does nothing."""
    rows = "".join(f"{'positive' if i % 3 == 0 else 'negative'},u{i % 5}\n" for i in range(60))
    (tmp_path / "log.csv").write_text("label,user\n" + rows)
    for seed in ("0", "1", "2", "3"):
        command = [sys.executable, "-m", "dlrm_jax.prepare", f"--input={tmp_path}/log.csv", f"--output={tmp_path}/out"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert "label: counted as negative: 'negative' (40)" in finished.stdout
