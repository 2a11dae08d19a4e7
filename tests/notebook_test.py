"""The notebook runs from its first cell to its last, on a small model."""

import json
import sys
import types

import pytest

from tests.helpers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]

SMALL = (
    'CONFIG = ["--dataset=synthetic", "--num_dense=3", "--table_sizes=500,30", "--embedding_dim=4", '
    '"--bottom_mlp=4", "--top_mlp=1", "--batch_size=32"]\nDEVICES = 2\n'
)


def test_every_cell_runs_and_strategies_learn_the_same(monkeypatch):
    cells = json.loads((ROOT / "experiments" / "sharding_comparison.ipynb").read_text())["cells"]
    shown: list = []
    display = types.ModuleType("IPython.display")
    display.__dict__.update(Image=lambda path: path.read_bytes(), Markdown=str, display=lambda *x: shown.extend(x))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(ROOT / "experiments")
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(SMALL, names)
    assert [part.startswith(b"\x89PNG") for part in shown if isinstance(part, bytes)] == [True, True]
    assert "row_wise" in shown[0] and len(names["losses"]) == 6
    assert max(names["losses"].values()) - min(names["losses"].values()) < 1e-6
