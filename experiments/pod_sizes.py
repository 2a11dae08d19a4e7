"""The MLPerf models planned and compiled for TPU pods of 8 to 1,024 chips, without a TPU; about a minute a pod.

    pip install ".[tpu-plan]" && python experiments/pod_sizes.py

Writes pod_sizes.json and pod_sizes.png, and the table between the markers of experiments/README.md.
"""

import argparse
import datetime
import json
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
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.training.topology import compile_report, parse_topology

HERE = pathlib.Path(__file__).resolve().parent
MODELS = ("shape_mlperf_dlrm", "shape_mlperf_dcnv2")
PODS = ("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x16", "v5e:8x8", "v6e:16x16")


def report(name: str, pod: str, known: dict | None) -> dict:
    """One model on one pod: predicted, and as XLA has it, or had it in `known`, an earlier report of the same plan."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["pod_sizes", f"--flagfile={HERE / name}.flags"])
    config, topology = config_from_flags(), parse_topology(pod)
    hardware = HARDWARE[topology.generation]
    mesh = MeshShape(1, topology.num_chips)
    setting = planner.Setting(model_of(config), config.optimizer, mesh, load_of(config), hardware, packed=True)
    cost = setting.cost_of(planner.auto_plan(setting))
    kinds = [placement.sharding for placement in cost.plan.tables.values()]
    placed = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    if known is None or known["placed"] != placed:
        compiled = compile_report(setting, LossConfig(), cost, topology).to_dict()
        compiled["compiled_on"] = str(datetime.date.today())
    else:
        compiled = known | {"predicted_held": cost.bytes_held}
    return compiled | {
        "model": name,
        "pod": pod,
        "chips": topology.num_chips,
        "placed": placed,
        "predicted_ms": cost.step_seconds * 1e3,
        "predicted_sent": cost.sent.total,
    }


def table(rows: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| model | pod | chips | tables placed | memory a chip, XLA | predicted | fits | sent a step, XLA | predicted "
        "| step, predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model'].removeprefix('shape_')} | {row['pod']} | {row['chips']:,} | {row['placed']} "
            f"| {row['held'] / 1e9:.3f} GB | {row['predicted_held'] / 1e9:.3f} GB | {'yes' if row['fits'] else 'no'} "
            f"| {sum(row['sent'].values()) / 1e6:.2f} MB | {row['predicted_sent'] / 1e6:.2f} MB "
            f"| {row['predicted_ms']:.2f} ms |"
        )
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("jax", "libtpu"))
    where = f"compiled on {os.cpu_count()} cores, Python {platform.python_version()}"
    dates = " and ".join(sorted({row["compiled_on"] for row in rows}))
    stamp = f"{dates}, {where}, {versions}; predicted {datetime.date.today()}"
    return "\n".join([*lines, "", f"{stamp}; `python experiments/pod_sizes.py`."])


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Memory and bytes sent a chip against the size of a v5p pod."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for color, name in zip(("C0", "C1"), MODELS, strict=True):
        mine = [row for row in rows if row["model"] == name and row["pod"].startswith("v5p")]
        chips, label = [row["chips"] for row in mine], name.removeprefix("shape_")
        axes[0].plot(chips, [row["held"] / 1e9 for row in mine], color=color, marker="o", label=label)
        axes[0].plot(chips, [row["predicted_held"] / 1e9 for row in mine], color=color, linestyle="--")
        sent = [sum(row["sent"].values()) / 1e6 for row in mine]
        axes[1].plot(chips, sent, color=color, marker="o", label=label)
        axes[1].plot(chips, [row["predicted_sent"] / 1e6 for row in mine], color=color, linestyle="--")
    for axis, title in zip(axes, ("memory of a chip, GB", "sent by a chip a step, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="chips of a v5p pod", title=f"{title} (dashed: predicted)")
        axis.set_xticks(sorted({row["chips"] for row in rows if row["pod"].startswith("v5p")}))
        axis.get_xaxis().set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Every model on every pod."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=str(HERE / "pod_sizes.json"), help="Where the numbers go.")
    parser.add_argument("--keep_compiled", action="store_true", help="predict anew beside what --json has of XLA")
    parser.add_argument("--pods", default=",".join(PODS), help="Topologies, with commas between them.")
    options = parser.parse_args()
    define_run_flags()
    rows = []
    known = json.loads(pathlib.Path(options.json).read_text()) if options.keep_compiled else []
    compiled = {(row["model"], row["pod"]): row for row in known}
    for name in MODELS:
        for pod in options.pods.split(","):
            rows.append(report(name, pod, compiled.get((name, pod))))
            print(table(rows[-1:]).splitlines()[2], flush=True)
    pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.pods == ",".join(PODS):
        draw(rows, HERE / "pod_sizes.png")
        replace_section(HERE / "README.md", "pod_sizes", table(rows))


if __name__ == "__main__":
    main()
