"""The Python interface as a package: its names, what importing it does, and the examples of its docstrings."""

import ast
import importlib
import inspect
import os
import subprocess
import sys

import pytest

import dlrm_jax
from tests.helpers import ROOT

FUNCTIONS = ("prepare", "train", "plan")


def test_importing_it_loads_no_jax_and_no_data_frames():
    script = (
        "import sys, dlrm_jax\n"
        "assert dlrm_jax.prepare.__name__ == 'prepare'\n"
        "heavy = {'jax', 'tensorflow_datasets', 'pandas', 'polars', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "dlrm_jax.train, dlrm_jax.Run, dlrm_jax.load, dlrm_jax.plan\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched'\n"
        "from absl import flags\n"
        "assert 'embedding_dim' not in flags.FLAGS, 'the process got flags'\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_stays_one_beside_the_command_of_its_name(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"dlrm_jax.{name}", raising=False)  # It is imported anew, as the first time.
    module = importlib.import_module(f"dlrm_jax.{name}")
    found = getattr(dlrm_jax, name)
    assert inspect.isfunction(found) and inspect.ismodule(module) and module.main.__module__ == f"dlrm_jax.{name}"
    assert found.__doc__ and ">>>" in found.__doc__ and len(inspect.signature(found).parameters) > 3
    scope: dict = {}
    exec(f"import dlrm_jax.{name}\nfrom dlrm_jax import {name} as f\nfrom dlrm_jax.{name} import command", scope)
    assert scope["f"] is scope["dlrm_jax"].__getattr__(name) is found and callable(scope["command"])


def test_what_tools_see_without_running_it_is_what_is_there():
    body = ast.parse((ROOT / "dlrm_jax" / "__init__.py").read_text()).body
    (block,) = (node for node in body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(told) == dlrm_jax.__all__ == sorted(set(dir(dlrm_jax)) & set(dlrm_jax.__all__))
    for name, module in told.items():
        assert getattr(dlrm_jax, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="module 'dlrm_jax' has no attribute 'trian'"):
        dlrm_jax.trian  # noqa: B018


EXAMPLES = """
import doctest, importlib
shown = 0
for name in ("preparing", "training", "run", "tables", "exported_model", "loading", "planning"):
    module = importlib.import_module(f"dlrm_jax.api.{name}")
    for example in sorted(doctest.DocTestFinder().find(module, globs={}), key=lambda one: one.lineno or 0):
        outcome = doctest.DocTestRunner().run(example)
        assert outcome.failed == 0, example.name
        shown += bool(outcome.attempted)
assert shown == 10, shown
"""


def test_every_example_runs_in_the_order_in_which_one_meets_them(tmp_path):
    """In one process of its own, as one types them."""
    path = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", EXAMPLES], cwd=tmp_path, env=os.environ | path, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()[-3000:]
