"""The notebooks run from their first cell to their last, each small and in a fresh kernel; none keeps outputs."""

import json
import os
import shutil
from typing import Any

import nbclient
import nbformat
import pytest

from tests.helpers import ROOT, SHARED

FOLDER = ROOT / "experiments"
FRAPPE = SHARED / "data" / "frappe"


def end_to_end(test):
    return pytest.mark.slow(pytest.mark.end_to_end(pytest.mark.usefixtures("optimised")(test)))


def cells(path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def result(name: str, tmp_path, parameters: str, asked: str) -> tuple[Any, int]:
    """(what `asked` is behind the last cell, how many pictures were shown) of a notebook with other parameters."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({asked}))"))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env=environment)
    for path in tmp_path.iterdir():
        shutil.rmtree(path, ignore_errors=True)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = sum("image/png" in output.get("data", ()) for output in outputs)
    return json.loads(outputs[-1].text.splitlines()[-1]), pictures


def test_notebooks_keep_no_outputs_and_begin_alike():
    """The first cell of code installs, the second has what can be changed; each is named in CONCEPTS.md."""
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    assert len(notebooks) == 6
    page = (ROOT / "docs" / "CONCEPTS.md").read_text()
    firsts = set()
    for path in notebooks:
        code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), path.name
        assert code[1]["metadata"] == {"tags": ["parameters"]}, path.name
        assert f"(../experiments/{path.name})" in page
        firsts.add("".join(code[0]["source"]))
    assert len(firsts) == 1 and "pip" in firsts.pop()


@end_to_end
def test_a_raw_log_becomes_a_model_that_is_judged(tmp_path):
    asked = '{"auc": auc, "rows": len(prepared), "interval": found["intervals"]["auc"]}'
    found, pictures = result("log_to_auc", tmp_path, "ROWS, EPOCHS = 8000, 2", asked)
    assert found["rows"] == 8000 and found["auc"] > 0.7
    assert found["interval"][0] < found["auc"] < found["interval"][1]
    assert pictures == 5


@end_to_end
def test_a_pod_is_planned_and_more_chips_hold_less_each(tmp_path):
    asked = "[[plan.fits, plan.bytes_held, plan.step_seconds] for plan in plans.values()]"
    (few, many), pictures = result("pod_plan", tmp_path, "CHIPS = (8, 64)", asked)
    assert not few[0] and many[0]
    assert few[1] > 4 * many[1] and few[2] > many[2]
    assert pictures == 2


@end_to_end
@pytest.mark.exhaustive
def test_smaller_tables_are_trained_and_served(tmp_path):
    small = 'ROWS = 20_000\nWAYS = {name: WAYS[name] for name in ("float32", "quotient-remainder")}'
    found, pictures = result("memory_and_quality", tmp_path, small, "[megabytes, aucs, optimum, served]")
    megabytes, aucs, optimum, served = found
    assert megabytes["quotient-remainder"] < 0.3 * megabytes["float32"]
    assert all(0.6 < auc < optimum for auc in aucs.values())
    assert served["float32"] == pytest.approx(aucs["float32"], abs=1e-6)
    assert set(served) == {"float32", "bfloat16", "int8", "int4"}
    assert all(abs(auc - served["float32"]) < 0.01 for auc in served.values())
    assert pictures == 2


@end_to_end
@pytest.mark.exhaustive
def test_a_recipe_comes_near_the_best_possible_score(tmp_path):
    small = 'SETTINGS = {"num_examples": 40_000}'
    (aucs, goal), pictures = result("published_result", tmp_path, small, "[aucs, goal]")
    assert len(aucs) == len(set(aucs)) == 2
    assert all(goal - 0.1 < auc < goal for auc in aucs)
    assert pictures == 1


@pytest.mark.exhaustive
@pytest.mark.skipif(not FRAPPE.is_dir(), reason="needs Frappe's files")
def test_frappes_published_result_is_reached(tmp_path):
    given = f"FRAPPE, SEEDS = {str(FRAPPE)!r}, 1"
    (aucs, published), _ = result("published_result", tmp_path, given, "[aucs, goal]")
    assert published == 0.984 and aucs[0] > published


@end_to_end
@pytest.mark.exhaustive
def test_a_server_gives_the_models_scores_and_takes_the_next_version(tmp_path):
    asked = "[first, first_here.tolist(), second, second_here.tolist(), server.returncode]"
    small = "ROWS, MORE, EPOCHS, SECONDS = 4000, 4000, 1, 1"
    found, pictures = result("serve_and_update", tmp_path, small, asked)
    first, first_here, second, second_here, status = found
    assert [first["model_version"], second["model_version"]] == ["1", "2"]
    assert first["probability"] == pytest.approx(first_here, abs=1e-6)
    assert second["probability"] == pytest.approx(second_here, abs=1e-6)
    assert first_here != second_here
    assert status == 0 and pictures == 2


@end_to_end
@pytest.mark.exhaustive
def test_every_strategy_learns_the_same(tmp_path):
    small = (
        'CONFIG = ["--dataset=synthetic", "--num_dense=3", "--table_sizes=500,30", "--embedding_dim=4", '
        '"--bottom_mlp=4", "--top_mlp=1", "--batch_size=32"]\nDEVICES = 2'
    )
    found, pictures = result("sharding_comparison", tmp_path, small, "results")
    losses = [row["loss"] for row in found.values()]
    assert "row_wise" in found and len(losses) == 6 and max(losses) - min(losses) < 1e-6
    assert pictures == 2
