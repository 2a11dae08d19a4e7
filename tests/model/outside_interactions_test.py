"""Tests `dlrm_jax/model/interactions/`: interactions of other packages, and what is wrong with them."""

import contextlib
import sys

import pytest

from dlrm_jax.api.trained import open_stored
from dlrm_jax.cli.flags import FLAGS, config_from_flags, define_run_flags, flagfile_text
from dlrm_jax.config import ConfigError, InteractionConfig
from dlrm_jax.host import registry
from dlrm_jax.model import interactions
from dlrm_jax.model.interactions import base
from dlrm_jax.planning.dense_work import dense_work
from dlrm_jax.serving.artifact.loaded import load
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.training.loop import train_and_evaluate
from tests.helpers import ROOT
from tests.serving_helpers import export_tiny


def example() -> str:
    """The Python file that docs/ADDING.md shows for an interaction."""
    text = (ROOT / "docs" / "ADDING.md").read_text()
    return text.partition("## An interaction")[2].partition("```python\n")[2].partition("```")[0]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A package of another, installed: its interaction `scaled`."""
    installed = tmp_path / "site"
    (installed / "theirs-1.dist-info").mkdir(parents=True)
    (installed / "theirs.py").write_text(example())
    (installed / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    points = installed / "theirs-1.dist-info" / "entry_points.txt"
    points.write_text("[dlrm_jax.interactions]\nscaled = theirs:Scaled\n")
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setattr(base.INTERACTIONS, "_known", dict(base.INTERACTIONS._known))
    registry._entry_points.cache_clear()
    yield points
    registry._entry_points.cache_clear()
    sys.modules.pop("theirs", None)


def test_an_interaction_from_outside_trains_and_exports(outside, tmp_path):
    with flags_of("--interaction=scaled", "--scaled_times=2", "--embedding_dim=4", "--bottom_mlp=4", "--top_mlp=4,1",
                  "--num_examples=2000", "--num_epochs=1", "--batch_size=256") as config:  # fmt: skip
        assert config.model.interaction == InteractionConfig("scaled", {"scaled_times": 2})
        train_and_evaluate(config, tmp_path / "run", flagfile_text())
    opened = open_stored(tmp_path / "run", "latest")
    scale = opened.dense_params["scaled"]["scale"]
    assert scale.shape == (4 * (1 + len(opened.model.features)),) and (scale != 1).any()
    assert dense_work(opened.model).interaction_width == len(scale)
    version = export_tiny(tmp_path / "model", opened.model)
    assert load(tmp_path / "model").self_check() < 1e-6
    with pytest.raises(ConfigError, match=r"native scores dot, cat, .*; this model has scaled"):
        NativeCpu(version)


def test_an_interaction_from_outside_that_is_broken_is_one_line(outside, capsys):
    outside.write_text("[dlrm_jax.interactions]\nscaled = theirs:Missing\n")
    registry._entry_points.cache_clear()
    with pytest.raises(SystemExit), flags_of():
        pass
    said = capsys.readouterr().err
    assert said.startswith("error: interaction 'scaled', which an installed package names as theirs:Missing, cannot be")
    assert said.count("\n") == 1


def test_an_option_with_the_name_of_a_flag_is_refused(capsys, monkeypatch):
    class Clash(interactions.Interaction):
        seed: int = 3

    monkeypatch.setattr(base.INTERACTIONS, "_known", base.registered() | {"clash": Clash})
    with pytest.raises(SystemExit), flags_of():
        pass
    assert "interaction 'clash': its option 'seed' has the name of another flag or another default; rename it" in (
        capsys.readouterr().err
    )


@contextlib.contextmanager
def flags_of(*argv: str):
    """The RunConfig of a command line; afterwards its flags are undefined again."""
    before = set(FLAGS)
    try:
        define_run_flags()
        FLAGS(["train", *argv])
        yield config_from_flags()
    finally:
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)
