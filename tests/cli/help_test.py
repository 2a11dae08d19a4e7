"""What --help and --helpshort say: every flag, in groups, with its default; and what fits a screen."""

import re

import pytest
from absl import flags

from dlrm_jax.cli import help
from dlrm_jax.cli.flags import groups, run_settings
from tests.helpers import ROOT
from tests.in_process import defined

COMMANDS = sorted(path.stem for path in (ROOT / "dlrm_jax").glob("*.py") if "def command" in path.read_text())


@pytest.fixture(params=COMMANDS)
def said(request, monkeypatch):
    """(what --help says of a command, what --helpshort says, its flags)."""
    monkeypatch.setenv("COLUMNS", "80")
    with defined(request.param):
        module = f"dlrm_jax.{request.param}"
        by_module = flags.FLAGS.flags_by_module_dict()
        known = {flag.name: flag for name in (module, "dlrm_jax.cli.flags") for flag in by_module.get(name, [])}
        yield help.text(module, short=False), help.text(module, short=True), known


def test_every_flag_is_explained_once_with_its_default(said):
    whole, _, known = said
    found = re.findall(r"^  --(?:\[no\])?(\w+)", whole, re.MULTILINE)
    assert sorted(found) == sorted(known)
    joined = " ".join(whole.split())
    for name, flag in known.items():
        if isinstance(flag.default, bool | int | float):
            assert re.search(rf"--(\[no\])?{name}(=\S+)? \[{re.escape(str(flag.default).lower())}\]", joined), name
    assert re.search(r"^  python -m dlrm_jax\.\w+ --\w+=", whole, re.MULTILINE), "one example"


def test_the_short_one_fits_a_screen(said):
    _, short, known = said
    lines = short.splitlines()
    assert len(lines) <= help.SCREEN_ROWS
    assert all(len(line) < 80 for line in lines if "python -m" not in line), "an example is copied as it stands"
    names = set(re.findall(r"\w+", short))
    needing = {name for name, one in run_settings().items() if one.needs}
    assert set(known) - needing <= names


def test_each_setting_of_a_run_is_in_one_group():
    names = [name for own in groups().values() for name in own]
    assert sorted(names) == sorted(run_settings())


def test_bounds_and_choices_are_those_that_absl_reads():
    with defined("train"):
        assert "--loss=bce|wbce|mse [bce]" in help.text("dlrm_jax.train", short=False)
        assert flags.FLAGS["loss"].parser.enum_values == ["bce", "wbce", "mse"]
