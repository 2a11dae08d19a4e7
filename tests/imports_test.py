"""Arrows point one way, only commands read flags, and importing the package touches neither a device nor TensorFlow."""

import ast
import functools
import subprocess
import sys

import pytest

from tests.helpers import ROOT

LAYERS = (
    {"config", "formulations", "gpu_atomics", "heap", "huge_pages", "interrupts", "rows"},
    {
        "batch",
        "checksums",
        "dense_optimizer",
        "files",
        "interaction",
        "loss",
        "memory",
        "schedule",
        "sharding.mesh",
        "sparse_optimizer",
    },
    {
        "data.encoding",
        "data.file_names",
        "data.hashing",
        "data.source",
        "data.times",
        "sharding.collective",
        "sharding.plan",
    },
    {"data.schema", "native.build", "pooling"},
    {
        "data.column_types",
        "data.dense",
        "data.json_lines",
        "data.label_values",
        "serving.errors",
        "serving.signature",
        "serving.store",
    },
    {
        "data.vocabulary",
        "data.columns",
        "data.schema_io",
        "data.presets",
        "data.staging",
        "data.records",
        "data.final_ids",
    },
    {"serving.transform", "data.decimals"},
    {"serving.weights"},
    {"serving.loaded"},
    {"serving.telemetry", "serving.protocol", "serving.page", "serving.openapi", "serving.load_generator"},
    {"serving.native"},
    {"serving.batching", "serving.repository"},
    {"serving.asgi"},
    {"serving.front"},
    {"serving.app"},
    {"serving.server"},
    {"data.hashes"},
    {"data.bags", "data.array_source", "data.table_source", "data.text_source", "data.splits", "data.blocks"},
    {"metrics", "model", "embedding", "data.dataset", "data.text", "data.statistics", "data.numbering"},
    {"data.windows", "data.trace", "data.time_column", "data.multi_hot", "data.first_pass", "data.second_pass"},
    {"state", "table_ops", "reporting", "data.planted", "data.criteo", "data.movielens", "data.synthetic"},
    {"data.prepared", "sharding.storage", "sharding.hlo", "sharding.hardware", "sharding.skew"},
    {"sharding.bags", "sharding.birth", "native.ops"},
    {"sharding.replicated", "sharding.owned", "sharding.routed", "sharding.columns"},
    {"data.pipeline", "data.open_log", "data.describe", "data.infer_column", "data.infer_layout", "sharding.exchange"},
    {"data.infer_label", "data.infer_features"},
    {"sharding.placed", "processes"},
    {"sharding.options", "sharding.reshard"},
    {"sharding.cost", "sharding.calibrate"},
    {"sharding.planner"},
    {"step", "checkpoint", "data.load", "data.infer", "data.preparation", "sharding.report"},
    {"data.builder"},
    {"compat", "run_config", "monitor"},
    {"sharding.topology"},
    {"evaluation", "placement", "stepper", "step_parts"},
    {"measuring"},
    {"serving.quantise"},
    {"serving.export"},
    {"serving.placed"},
    {"trained"},
    {"loop", "flag_effects"},
    {"flags", "commands"},
    {"train", "evaluate", "prepare", "plan", "export", "serve", "loadtest", "benchmark"},
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
COMMANDS = {"flags", "commands", "train", "evaluate", "prepare", "plan", "export", "serve", "loadtest", "benchmark"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    package = ROOT / "dlrm_jax"
    trees = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__init__.py":
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
        if other.startswith("dlrm_jax.") and target in LAYER_OF:
            assert LAYER_OF[target] < LAYER_OF[name], f"{name} imports {target}, which is not in a lower layer"


def test_only_commands_read_flags():
    readers = {name for name, tree in modules().items() if {"absl.flags", "absl.app"} & imported(tree)}
    assert readers <= COMMANDS


def test_loading_a_model_imports_no_training_code():
    """Where a model is served there need be no Flax, Optax, Orbax, TFDS or Arrow."""
    script = (
        "import sys, dlrm_jax.serving\n"
        "heavy = {'flax', 'optax', 'orbax', 'tensorflow_datasets', 'pyarrow', 'absl', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_preparation_imports_no_jax():
    """It runs where no accelerator is, and starts in a third of a second."""
    script = (
        "import sys, dlrm_jax.prepare\nassert 'jax' not in sys.modules and 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_import_starts_no_device_and_no_tensorflow():
    names = ", ".join(f"dlrm_jax.{name}" for name in sorted(modules()))
    script = (
        f"import sys, {names}\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched'\n"
        "assert 'tensorflow' not in sys.modules, 'tensorflow was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
