"""Folders are layers, arrows point one way, only commands read flags; importing touches no device, no TensorFlow."""

import ast
import functools
import graphlib
import subprocess
import sys

import pytest

from tests.helpers import ROOT

FOLDERS = (
    *("config", "host", "model", "data", "tables", "planning", "training", "judging"),
    *("compat", "serving", "tuning", "cli", "api"),
)
"""From the lowest to the highest; what is in none of them is a command, and above them all."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    package = ROOT / "dlrm_jax"
    names = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name: ast.parse(path.read_text()) for name, path in names.items() if not name.endswith("__init__")}


def imported(tree: ast.Module) -> set[str]:
    """Dotted names a module imports, `from a import b` giving a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_this_package(tree: ast.Module) -> set[str]:
    return {name.removeprefix("dlrm_jax.") for name in imported(tree)} & set(modules())


def layer(name: str) -> int:
    folder = name.partition(".")[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_module_imports_its_own_folder_and_lower_ones_only(name):
    upwards = {other for other in of_this_package(modules()[name]) if layer(other) > layer(name)}
    assert not upwards, f"{name} imports {sorted(upwards)}, of a higher layer"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: of_this_package(tree) for name, tree in modules().items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle.
    assert all(order.index(other) < order.index(name) for name, others in graph.items() for other in others)


def test_only_commands_read_flags():
    readers = {name for name, tree in modules().items() if {"absl.flags", "absl.app"} & imported(tree)}
    assert all(layer(name) >= FOLDERS.index("cli") for name in readers), readers


def test_loading_a_model_imports_no_training_code():
    """Where a model is served there need be no Flax, Optax, Orbax, TFDS or Arrow."""
    script = (
        "import sys, dlrm_jax.serving\n"
        "heavy = {'flax', 'optax', 'orbax', 'tensorflow_datasets', 'pyarrow', 'absl', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_preparation_imports_no_jax():
    """It runs where no accelerator is, and starts in a third of a second."""
    script = (
        "import sys, dlrm_jax.prepare\nassert 'jax' not in sys.modules and 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_import_starts_no_device_and_no_tensorflow():
    names = ", ".join(f"dlrm_jax.{name}" for name in sorted(modules()))
    script = (
        f"import sys, {names}\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched'\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
