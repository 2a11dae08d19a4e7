"""Every wrong use of experiments/wrong_uses.py ends in one line that says what is wrong, and is in the table.

Each is a process of its own, so that a third of them runs by default, and all with `pytest -m ''`.
"""

import pathlib

import pytest

from experiments.wrong_uses import CASES, TABLE, last_line, make_scratch, run

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]
ALL = [case for cases in CASES.values() for case in cases]
_BY_DEFAULT = 3


@pytest.fixture(scope="session")
def scratch(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("wrong_uses")
    make_scratch(directory)
    return directory


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.exhaustive] * bool(i % _BY_DEFAULT)) for i, case in enumerate(ALL)],
    ids=lambda case: case.command,
)
def test_one_line_says_what_is_wrong(scratch, case):
    finished = run(scratch, case.command)
    assert finished.returncode not in (0, -6, -9, -11), finished.stdout
    line = last_line(finished)
    assert line.startswith("error: ") and case.says in line, finished.stderr
    assert finished.stderr.count("error: ") == 1 and "Traceback" not in finished.stderr
    assert len(line) <= 600


def test_the_table_shows_every_case():
    text = TABLE.read_text()
    assert len(ALL) >= 80 and len({case.command for case in ALL}) == len(ALL)
    for case in ALL:
        assert f"| `{case.command}` |" in text
