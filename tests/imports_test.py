"""Arrows point one way, only commands read flags, and importing the package touches neither a device nor TensorFlow."""

import ast
import subprocess
import sys

import pytest

from tests.helpers import ROOT

LAYERS = (
    {"config"},
    {"batch", "sparse_optimizer", "dense_optimizer", "interaction", "loss", "schedule"},
    {"metrics", "model", "embedding", "data.dataset", "data.text"},
    {"state", "reporting", "data.planted", "data.criteo", "data.movielens", "data.pipeline"},
    {"step", "checkpoint", "data"},
    {"compat", "run_config", "monitor"},
    {"evaluation"},
    {"loop"},
    {"flags"},
    {"train", "evaluate"},
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
COMMANDS = {"flags", "train", "evaluate"}


def modules() -> dict[str, ast.Module]:
    package = ROOT / "dlrm_jax"
    trees = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            trees[name] = ast.parse(path.read_text())
    return trees


def imported(tree: ast.Module) -> set[str]:
    """Dotted names a module imports, `from a import b` giving a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(modules()))
def test_module_imports_lower_layers_only(name):
    assert name in LAYER_OF, f"{name} is new: give it a layer in this test"
    for other in imported(modules()[name]):
        target = other.removeprefix("dlrm_jax.")
        # `from dlrm_jax.data import planted` names the package too; what counts is the module that it means.
        package_itself = target == "data" and name.startswith("data")
        if other.startswith("dlrm_jax.") and target in LAYER_OF and not package_itself:
            assert LAYER_OF[target] < LAYER_OF[name], f"{name} imports {target}, which is not in a lower layer"


def test_only_commands_read_flags():
    readers = {name for name, tree in modules().items() if {"absl.flags", "absl.app"} & imported(tree)}
    assert readers <= COMMANDS


def test_import_starts_no_device_and_no_tensorflow():
    names = ", ".join(f"dlrm_jax.{name}" for name in sorted(modules()))
    script = (
        f"import sys, {names}\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched'\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
