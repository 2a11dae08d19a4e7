"""Training steps compiled for TPUs without a TPU: what grows with the tables, what XLA does row by row, the roofline.

    pip install ".[tpu-plan]" && python experiments/tpu_steps.py

Each step is compiled with the tables as they are and with half their rows; the difference of its temporaries over
that of its arguments is what a byte of tables costs besides itself, and must be next to nothing. A run's step cuts its
batch out of a window, which must cost no loop. Writes the table between the markers of experiments/README.md.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import platform
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags
from measure import replace_section

from dlrm_jax.api.planning import load_of, model_of
from dlrm_jax.cli.flags import config_from_flags, define_run_flags
from dlrm_jax.config import LossConfig
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.planning import planner
from dlrm_jax.planning.cost import Cost
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.training.topology import Compiled, Topology, compile_report, parse_topology

HERE = pathlib.Path(__file__).resolve().parent
MODELS = ("kaggle", "terabyte")
PODS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
WINDOW_STEPS = 64


def setting_of(name: str, topology: Topology, share: int) -> tuple[planner.Setting, Cost]:
    """A preset on a pod, its tables cut to a `share`-th of their rows, and what they cost row-wise."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["tpu_steps", f"--flagfile={HERE / f'shape_{name}'}.flags", "--table_optimizer=rowwise_adagrad"])
    config = config_from_flags()
    model = model_of(config)
    tables = tuple(dataclasses.replace(t, num_embeddings=max(t.num_embeddings // share, 1)) for t in model.tables)
    model = dataclasses.replace(model, tables=tables)
    mesh, hardware = MeshShape(1, topology.num_chips), HARDWARE[topology.generation]
    setting = planner.Setting(model, config.optimizer, mesh, load_of(config), hardware, packed=True)
    return setting, setting.cost("row_wise")


def row(name: str, pod: str) -> str:
    """One model on one pod, as Markdown."""
    topology = parse_topology(pod)
    compiled: list[Compiled] = []
    for share in (1, 2):
        setting, cost = setting_of(name, topology, share)
        compiled.append(compile_report(setting, LossConfig(), cost, topology))
        if share == 1:
            windowed = compile_report(setting, LossConfig(), cost, topology, WINDOW_STEPS)
    whole, half = compiled
    cost = whole.predicted
    grown = (whole.temporaries - half.temporaries) / (whole.arguments - half.arguments)
    longest = max(cost.seconds.values())
    return (
        f"| {name} | {pod} | {whole.arguments / 1e6:,.0f} MB | {whole.temporaries / 1e6:,.1f} MB | {grown:+.4f} "
        f"| {whole.serial_loops} | {windowed.temporaries / 1e6:,.1f} MB, {windowed.serial_loops} "
        f"| {cost.step_seconds * 1e3:.3f} ms | {cost.bound} | {longest / cost.step_seconds:.0%} |"
    )


def main() -> None:
    """Every model on every pod."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="presets, with commas between them")
    parser.add_argument("--pods", default=",".join(PODS), help="topologies, with commas between them")
    options = parser.parse_args()
    define_run_flags()
    lines = [
        "| model | pod | tables and state a chip | temporaries | a byte of tables adds | serial loops | of a window "
        "| step, estimated | bound by | its share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in options.models.split(","):
        for pod in options.pods.split(","):
            lines.append(row(name, pod))
            print(lines[-1], flush=True)
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("jax", "libtpu"))
    where = f"compiled {datetime.date.today()} on {os.cpu_count()} cores, Python {platform.python_version()}"
    if (options.models, options.pods) == (",".join(MODELS), ",".join(PODS)):
        text = "\n".join([*lines, "", f"{where}, {versions}; `python experiments/tpu_steps.py`."])
        replace_section(HERE / "README.md", "tpu_steps", text)


if __name__ == "__main__":
    main()
