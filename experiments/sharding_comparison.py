"""Every sharding strategy on the devices at hand: time, bytes, balance and memory, predicted beside measured.

    python experiments/sharding_comparison.py --flagfile=experiments/shape_kaggle.flags --max_rows_per_table=1000000 \
        --devices=8 [--json=FILE] [--picture=FILE] [--fake] [--readme]

`--fake` makes N CPU devices of this machine, which tells what is sent and held, not how fast real links are. All
strategies start from the same weights and take the same batches, alternately; times are medians.
"""

import json
import os
import pathlib
import sys
import time

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("devices", 8, "Devices to use.")
flags.DEFINE_bool("fake", False, "Make that many CPU devices out of this machine.")
flags.DEFINE_integer("rounds", 12, "Timed steps of each strategy.")
flags.DEFINE_string("json", "", "Write all numbers here.")
flags.DEFINE_string("picture", "", "Draw them here, as PNG.")
flags.DEFINE_bool("readme", False, "Renew the section of experiments/README.md.")


def main(argv: list[str]) -> None:
    """Prepare all strategies, step them in turn, and report."""
    del argv
    import jax

    from dlrm_jax.host.files import require_output_file

    require_output_file("json", FLAGS.json)
    require_output_file("picture", FLAGS.picture)
    if FLAGS.fake:
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    results, sentence = compare(jax.devices()[: FLAGS.devices])
    print(f"{table(results)}\n\n{sentence}")
    if FLAGS.json:
        pathlib.Path(FLAGS.json).write_text(json.dumps(results, indent=1) + "\n")
    if FLAGS.picture:
        draw(results, pathlib.Path(FLAGS.picture))
    if FLAGS.readme:
        from measure import ROOT, replace_section, where_and_when

        from dlrm_jax.training.reporting import versions

        command = f"`python experiments/sharding_comparison.py {' '.join(_own_flags())}`"
        text = f"{table(results)}\n\n{sentence}\n\nMeasured {where_and_when(versions())}; {command}."
        replace_section(ROOT / "experiments" / "README.md", "sharding", text)


def _own_flags() -> list[str]:
    kept = ("--flagfile", "--devices", "--fake", "--max_rows_per_table", "--mesh", "--batch_size")
    return [argument for argument in sys.argv[1:] if argument.split("=")[0] in kept]


def compare(devices: list) -> tuple[dict[str, dict], str]:
    """Numbers of each strategy by name, and a sentence on what row_wise sends."""
    import jax
    import numpy as np

    from dlrm_jax.api.planning import load_of, model_of
    from dlrm_jax.cli.flags import config_from_flags
    from dlrm_jax.data.generate import synthetic
    from dlrm_jax.host.mesh import make_mesh, parse_mesh
    from dlrm_jax.planning import planner, report
    from dlrm_jax.planning.hardware import of_device
    from dlrm_jax.planning.hlo import collectives, totals
    from dlrm_jax.training.placed import Placed
    from dlrm_jax.training.step import make_train_step

    config = config_from_flags()
    model = model_of(config)
    shape = parse_mesh(config.sharding.mesh, len(devices))
    hardware = of_device(devices[0], len(devices))
    setting = planner.Setting(model, config.optimizer, shape, load_of(config), hardware, config.sharding.group_size)
    sizes = tuple(model.table(feature.table).num_embeddings for feature in model.features)
    bags = tuple(feature.hotness for feature in model.features)
    spec = synthetic.Spec(model.num_dense, sizes, bags, config.data.id_skew)
    draw = jax.jit(synthetic.device_batch, static_argnums=(0, 1, 2))
    batch = jax.device_get(draw(spec, config.seed, config.batch_size))
    runs, results = {}, {}
    for name, cost in planner.ranking(setting):
        placed = Placed(model, config.optimizer, cost.plan, make_mesh(shape, devices), cost.options)
        step = placed.jit_step(make_train_step(model, config.loss, config.optimizer, 1, placed.ops))
        state, on_devices = placed.init_state(config.seed), placed.put(batch)
        compiled = step.lower(state, on_devices).compile()
        memory, sent = compiled.memory_analysis(), totals(collectives(compiled.as_text()))
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        held += memory.output_size_in_bytes - memory.alias_size_in_bytes
        runs[name] = [compiled, state, on_devices, []]
        least, most = report.balance(cost)
        results[name] = {
            "sent": sent,
            "sent_predicted": dict(cost.sent.bytes_by_kind),
            "bytes": held,
            "bytes_predicted": cost.bytes_held,
            "tables_least": least,
            "tables_most": most,
            "seconds_predicted": cost.step_seconds,
        }
    for _ in range(FLAGS.rounds + 2):
        for name, run in runs.items():
            compiled, state, on_devices, taken = run
            start = time.perf_counter()
            run[1], metrics = compiled(state, on_devices)
            jax.block_until_ready((run[1], metrics))
            taken.append(time.perf_counter() - start)
            results[name]["loss"] = float(metrics["loss"])
    for name, run in runs.items():
        results[name]["seconds"] = float(np.median(run[3][2:]))
    return results, volumes(model, batch.ids_BxK, results["row_wise"]["sent"]) if shape.model > 1 else ""


def volumes(model, ids_BxK, sent: dict[str, int]) -> str:
    """What row_wise sends, beside the least possible and beside the form that reduces partial sums of all owners."""
    import numpy as np

    needed, start = 0.0, 0
    for feature in model.features:
        columns = ids_BxK[:, start : start + feature.hotness]
        needed += sum(len(np.unique(part)) for part in np.split(columns, FLAGS.devices)) / FLAGS.devices
        start += feature.hotness
    row_bytes = 4 * model.embedding_dim
    ideal, scattered = 2 * needed * row_bytes, 2 * len(ids_BxK) * len(model.features) * row_bytes
    exchanged = sent["all-to-all"]
    return (
        f"row_wise exchanges {exchanged / 1e6:.3f} MB a device and step, {exchanged / ideal:.2f} of the "
        f"{ideal / 1e6:.3f} MB that each needed row takes once each way; reducing all owners' partial sums would take "
        f"{scattered / 1e6:.3f} MB, {scattered / ideal:.1f} of it."
    )


def table(results: dict[str, dict]) -> str:
    """Markdown, fastest first."""
    lines = [
        "| strategy | step | predicted | sent | predicted | memory a device | predicted | tables of a device |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results.items(), key=lambda item: item[1]["seconds"]):
        sent, predicted = (sum(row[key].values()) / 1e6 for key in ("sent", "sent_predicted"))
        lines.append(
            f"| {name} | {row['seconds'] * 1e3:.2f} ms | {row['seconds_predicted'] * 1e3:.2f} ms | {sent:.3f} MB "
            f"| {predicted:.3f} MB | {row['bytes'] / 1e6:.1f} MB | {row['bytes_predicted'] / 1e6:.1f} MB "
            f"| {row['tables_least'] / 1e6:.1f}-{row['tables_most'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict], path: pathlib.Path) -> None:
    """Bars: time, bytes and memory, measured beside predicted."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    names = sorted(results, key=lambda name: results[name]["seconds"])

    def values(key: str, scale: float) -> list[float]:
        found = [results[name][key] for name in names]
        return [scale * (sum(value.values()) if isinstance(value, dict) else value) for value in found]

    columns = (
        ("step, ms", values("seconds", 1e3), values("seconds_predicted", 1e3)),
        ("sent a device and step, MB", values("sent", 1e-6), values("sent_predicted", 1e-6)),
        ("memory a device, MB", values("bytes", 1e-6), values("bytes_predicted", 1e-6)),
    )
    places = np.arange(len(names))
    for axis, (title, measured, predicted) in zip(figure.subplots(1, 3), columns, strict=True):
        axis.bar(places - 0.2, measured, 0.4, label="measured")
        axis.bar(places + 0.2, predicted, 0.4, label="predicted")
        axis.set_xticks(places, names, rotation=40, ha="right")
        axis.set_title(title)
        axis.set_ylim(0, 1.25 * max(*measured, *predicted))
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from dlrm_jax.cli.flags import define_run_flags

    define_run_flags()
    app.run(main)
