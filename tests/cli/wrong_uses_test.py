"""Every wrong use of experiments/wrong_uses.py ends in one line that says what is wrong, and is in the table."""

import pathlib
import shlex
import subprocess

import pytest

from experiments.wrong_uses import CASES, TABLE, last_line, make_scratch, run
from tests import forked

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]
ALL = [case for cases in CASES.values() for case in cases]


@pytest.fixture(scope="session")
def scratch(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("wrong_uses")
    make_scratch(directory)
    return directory


def run_as_said(scratch: pathlib.Path, command: str) -> subprocess.CompletedProcess[str]:
    module, *flags = shlex.split(command)
    # What begins with a setting of the environment is a process of its own.
    return run(scratch, command) if "=" in module else forked.run(module, *flags, cwd=scratch)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.command)
@pytest.mark.sample(15)
def test_one_line_says_what_is_wrong(scratch, case):
    finished = run_as_said(scratch, case.command)
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
