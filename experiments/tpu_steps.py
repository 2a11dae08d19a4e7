"""Training steps compiled for TPUs without a TPU: what grows with the tables, what XLA does row by row, the roofline.

    pip install ".[tpu-plan]" && python experiments/tpu_steps.py

Each step is compiled with the tables as they are and with half their rows; the difference of its temporaries over
that of its arguments is what a byte of tables costs besides itself, and must be next to nothing. A run's step cuts its
batch out of a window, whose rows travelled, or stay on every chip, or are made in the step: without a loop, and of rows
that stay, compiled with half of them too, without a copy. Writes the table of experiments/README.md.
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
from dlrm_jax.config import LossConfig, ModelConfig
from dlrm_jax.data.generate.synthetic import Log, Spec
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.planning import planner
from dlrm_jax.planning.cost import Cost
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.training.topology import Compiled, Topology, Windows, compile_report, parse_topology

HERE = pathlib.Path(__file__).resolve().parent
MODELS = ("kaggle", "terabyte")
PODS = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
WINDOW_STEPS = 64
RESIDENT_ROWS = 10_000_000


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


def with_rows(setting: planner.Setting, rows: int) -> tuple[planner.Setting, Cost]:
    """The same with so many rows of the data on every chip."""
    setting = dataclasses.replace(setting, load=dataclasses.replace(setting.load, resident_rows=rows))
    return setting, setting.cost("row_wise")


def maker_of(model: ModelConfig) -> Log:
    """What makes rows for a model."""
    tables = tuple(model.table(feature.table).num_embeddings for feature in model.features)
    return Log(Spec(model.num_dense, tables, tuple(feature.hotness for feature in model.features)), 0)


def added(more: Compiled, less: Compiled) -> float:
    """Bytes of temporaries for a byte of arguments more."""
    return (more.temporaries - less.temporaries) / (more.arguments - less.arguments)


def temporaries(step: Compiled) -> str:
    """And the loops that are none of the program's."""
    return f"{step.temporaries / 1e6:,.1f} MB, {step.serial_loops}"


def row(name: str, pod: str) -> str:
    """One model on one pod, as Markdown."""
    topology = parse_topology(pod)

    def compiled(planned: tuple[planner.Setting, Cost], windows: Windows | None = None) -> Compiled:
        return compile_report(planned[0], LossConfig(), planned[1], topology, windows)

    planned = setting, cost = setting_of(name, topology, 1)
    whole, half = compiled(planned), compiled(setting_of(name, topology, 2))
    of_window = compiled(planned, Windows(WINDOW_STEPS))
    stays, fewer = (
        compiled(with_rows(setting, rows), Windows(WINDOW_STEPS, rows)) for rows in (RESIDENT_ROWS, RESIDENT_ROWS // 2)
    )
    made = compiled(planned, Windows(WINDOW_STEPS, RESIDENT_ROWS, maker_of(setting.model)))
    longest = max(cost.seconds.values())
    return (
        f"| {name} | {pod} | {whole.arguments / 1e6:,.0f} MB | {temporaries(whole)} | {added(whole, half):+.4f} "
        f"| {temporaries(of_window)} | {temporaries(stays)} | {added(stays, fewer):+.4f} "
        f"| {stays.held / 1e9:.2f}, {stays.predicted.bytes_held / 1e9:.2f} GB | {temporaries(made)} "
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
        "| model | pod | tables and state a chip | temporaries, loops | a byte of tables adds | of a window "
        "| rows stay | a byte of rows adds | memory then, predicted | rows are made "
        "| step, estimated | bound by | its share |",
        "|" + 13 * "---|",
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
