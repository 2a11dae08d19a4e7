"""Measure a run's step: `python -m dlrm_jax.benchmark --flagfile=experiments/shape_kaggle.flags`.

Prints, for training and for scoring: compile time, step time, samples/s, where the time goes, how near the hardware's
ceilings, and memory. `--sweep=batch` (rows, hotness, dim, devices) repeats it over sizes and shows how cost grows;
`--input` measures the road from the data to the devices instead.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.flags import config_from_flags, define_run_flags
from dlrm_jax.config import ConfigError
from dlrm_jax.host import files
from dlrm_jax.host.texts import aligned
from dlrm_jax.planning.calibrate import calibrate
from dlrm_jax.training import measuring_input, reporting, step_parts
from dlrm_jax.training.measuring import FORWARD, INPUT, TRAIN, measure
from dlrm_jax.training.measuring_input import measure_input
from dlrm_jax.training.run_config import RunConfig

FLAGS = flags.FLAGS
SWEEPS = ("batch", "rows", "hotness", "dim", "devices")


def define_benchmark_flags() -> None:
    """Define this command's own flags."""
    flags.DEFINE_enum("sweep", "", ("", *SWEEPS), "Measure at several values of this, and show how cost grows.")
    flags.DEFINE_list("sweep_values", [], "The values of --sweep. Default: some around the run's own.")
    flags.DEFINE_bool("input", False, "Measure the road from the data to the devices alone, by stage, and no step.")
    flags.DEFINE_float("seconds", 5.0, "How long training and scoring are stepped, each.", lower_bound=0)
    flags.DEFINE_bool("calibrate", False, "Measure what the device can do first, and hold the step against that.")
    flags.DEFINE_string("json", "", "Write all numbers here.")
    flags.DEFINE_string("picture", "", "Draw them here, as PNG.")


def swept(config: RunConfig, sweep: str, values: list[str]) -> dict[int, RunConfig]:
    """The run at each value of a sweep; ConfigError where it has no such size."""
    numbers = [int(value) for value in values if value.isdecimal() and int(value) > 0]
    if len(numbers) < len(values):
        raise ConfigError(f"--sweep_values={','.join(values)} are not all whole numbers of at least 1")
    if sweep in ("rows", "hotness") and (config.data.dataset != "synthetic" or config.data.data_dir):
        raise ConfigError(f"--sweep={sweep} changes the data, so it needs --dataset=synthetic")
    defaults: dict[str, Callable[[], list[int]]] = {
        "batch": lambda: [max(1, config.batch_size * 4**i // 64) for i in range(5)],
        "rows": lambda: [10**i for i in range(2, math.ceil(math.log10(max(config.data.table_sizes))) + 1)],
        "hotness": lambda: [1, 2, 4, 8, 16, 32],
        "dim": lambda: [8, 16, 32, 64, 128],
        "devices": lambda: [2**i for i in range(int(math.log2(jax.device_count())) + 1)],
    }
    return {value: _at(config, sweep, value) for value in dict.fromkeys(numbers or defaults[sweep]())}


def _at(config: RunConfig, sweep: str, value: int) -> RunConfig:
    replace = dataclasses.replace
    match sweep:
        case "batch":
            return replace(config, batch_size=value)
        case "rows":
            return replace(config, data=replace(config.data, max_rows_per_table=value))
        case "hotness":
            return replace(config, data=replace(config.data, hotness=(value,)))
        case "dim":
            bottom = (*config.model.bottom_mlp[:-1], value) if config.model.bottom_mlp else ()
            return replace(config, model=replace(config.model, embedding_dim=value, bottom_mlp=bottom))
        case _:
            if value > jax.device_count():
                raise ConfigError(f"--sweep_values has {value} devices, but there are {jax.device_count()}")
            return replace(config, sharding=replace(config.sharding, mesh=f"model:{value}"))


def text(numbers: dict[str, Any]) -> str:
    """One run's numbers for people."""
    hardware = numbers["hardware"]
    lines = [
        f"batch {numbers['batch_size']:,} on {numbers['devices']} device(s); ceilings of {hardware['name']}: "
        f"{hardware['flops'] / 1e9:,.0f} GFLOP/s, {hardware['memory_rate'] / 1e9:,.1f} GB/s"
    ]
    for kind in (TRAIN, FORWARD):
        one = numbers[kind]
        low, high = one["quartiles"]
        lines += [
            f"{kind}: {one['step_seconds'] * 1e3:,.3f} ms a step, dispatched back to back (quartiles {low * 1e3:,.3f} "
            f"to {high * 1e3:,.3f}), {one['waited_seconds'] * 1e3:,.3f} ms waited for one by one; "
            f"{one['samples_per_second']:,.0f} samples/s, {one['steps']} steps, compiled in "
            f"{one['compile_seconds']:.1f} s",
            f"  {one['flops'] / 1e9:,.2f} GFLOP ({one['flops_share']:.0%} of the ceiling), "
            f"{one['traffic_bytes'] / 1e6:,.1f} MB ({one['traffic_share']:.0%}); bound by {one['bound']}, "
            f"{one['roofline']:.0%} of the roofline",
            f"  holds {one['held_bytes'] / 1e6:,.1f} MB, temporaries {one['temporary_bytes'] / 1e6:,.1f} MB",
        ]
        if one.get("parts"):
            lines.append("  " + ", ".join(f"{part} {share:.1%}" for part, share in one["parts"].items()))
    waiting = numbers[INPUT]["step_seconds"]
    lines.append(
        f"input: {waiting * 1e3:,.3f} ms a batch, {waiting / numbers[TRAIN]['step_seconds']:.0%} of a step, beside it"
    )
    return "\n".join([*lines, f"peak memory {numbers['peak_bytes'] / 1e6:,.0f} MB"])


def sweep_text(sweep: str, points: dict[int, dict[str, Any]]) -> str:
    """A line a value."""
    rows = [[sweep, "train ms", "forward ms", "samples/s", "held MB", "compile s"]]
    for value, numbers in points.items():
        train, forward = numbers[TRAIN], numbers[FORWARD]
        milliseconds = [f"{one['step_seconds'] * 1e3:,.3f}" for one in (train, forward)]
        rest = [f"{train['samples_per_second']:,.0f}", f"{train['held_bytes'] / 1e6:,.1f}"]
        rows.append([f"{value:,}", *milliseconds, *rest, f"{train['compile_seconds']:.1f}"])
    return aligned(rows, left=())


def draw(numbers: dict[str, Any], path: pathlib.Path) -> None:
    """Where the time goes: a bar for training, one for scoring, the input beside them."""
    from matplotlib.figure import Figure  # A second to import; no pyplot, so that no display is asked for.

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axis = figure.subplots()
    for i, part in enumerate(step_parts.PARTS):
        widths = [numbers[k]["parts"].get(part, 0) * numbers[k]["step_seconds"] * 1e3 for k in (FORWARD, TRAIN)]
        lefts = [
            sum(numbers[k]["parts"].get(other, 0) for other in step_parts.PARTS[:i]) * numbers[k]["step_seconds"] * 1e3
            for k in (FORWARD, TRAIN)
        ]
        axis.barh(["forward", "train"], widths, left=lefts, label=part)
    axis.barh(["input"], [numbers[INPUT]["step_seconds"] * 1e3], color="gray")
    axis.set_xlabel(f"ms a step of {numbers['batch_size']:,} samples")
    axis.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=120)


def draw_sweep(sweep: str, points: dict[int, dict[str, Any]], path: pathlib.Path) -> None:
    """Step time over the swept size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for kind in (TRAIN, FORWARD):
        axis.plot(list(points), [one[kind]["step_seconds"] * 1e3 for one in points.values()], marker="o", label=kind)
    axis.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms a step")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Flags to configs, configs to numbers, numbers to the screen, a file and a picture."""
    files.require_output_file("json", FLAGS.json)
    files.require_output_file("picture", FLAGS.picture)
    config = config_from_flags()
    if FLAGS.sweep_values and not FLAGS.sweep:
        raise ConfigError("--sweep_values needs --sweep, which says of what")
    if not math.isfinite(FLAGS.seconds):
        raise ConfigError(f"--seconds={FLAGS.seconds} never ends; give a number")
    configs = swept(config, FLAGS.sweep, FLAGS.sweep_values) if FLAGS.sweep else {}
    hardware = calibrate() if FLAGS.calibrate else None
    workdir = pathlib.Path(FLAGS.workdir) if FLAGS.workdir else None
    if FLAGS.input:
        clashing = next((name for name in ("sweep", "picture") if getattr(FLAGS, name)), None)
        if clashing:
            raise ConfigError(f"--input measures no step, so --{clashing} has nothing to show; leave one out")
        result: dict[str, Any] = measure_input(config, FLAGS.seconds, workdir)
        print(measuring_input.text(result))
    elif not configs:
        numbers = measure(config, FLAGS.seconds, hardware, workdir=workdir)
        print(text(numbers))
        result = numbers
    else:
        points = {value: measure(one, FLAGS.seconds, hardware, False, workdir) for value, one in configs.items()}
        print(sweep_text(FLAGS.sweep, points))
        result = {"sweep": FLAGS.sweep, "points": {str(value): one for value, one in points.items()}}
    if FLAGS.json:
        reporting.write_json_atomically(pathlib.Path(FLAGS.json), result | {"versions": reporting.versions()})
    if FLAGS.picture and configs:
        draw_sweep(FLAGS.sweep, points, pathlib.Path(FLAGS.picture))
    elif FLAGS.picture:
        draw(numbers, pathlib.Path(FLAGS.picture))


def command() -> None:
    """The command, as a console script calls it too."""
    define_benchmark_flags()
    define_run_flags()
    run_command(main)


if __name__ == "__main__":
    command()
