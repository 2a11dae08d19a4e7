"""Plan a run before it is made: `python -m dlrm_jax.plan --flagfile=FILE --devices=8 --hardware=h100`.

Nothing is allocated; with --hardware no accelerator is touched. The table says where each embedding table lies and
why, what a device holds and sends, how long a step should take, and how the other strategies compare.
"""

import dataclasses
import pathlib

from absl import flags

from dlrm_jax.cli import flags as run_flags
from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.flags import config_from_flags, define_run_flags
from dlrm_jax.config import ConfigError, ModelConfig
from dlrm_jax.host import files
from dlrm_jax.host.mesh import parse_mesh
from dlrm_jax.planning import hardware, planner, report
from dlrm_jax.planning.calibrate import calibrate
from dlrm_jax.training import reporting
from dlrm_jax.training.opening import read
from dlrm_jax.training.options import choose_plan
from dlrm_jax.training.placement import load_of
from dlrm_jax.training.run_config import ALWAYS, RunConfig
from dlrm_jax.training.topology import compile_report, parse_topology

FLAGS = flags.FLAGS


def define_plan_flags() -> None:
    """Define this command's own flags."""
    flags.DEFINE_integer("devices", 0, "Devices to plan for; 0: those of --mesh or --topology, else 8.")
    flags.DEFINE_string("hardware", "", f"What they are: {', '.join(hardware.HARDWARE)}. Default: the device at hand.")
    flags.DEFINE_string("topology", "", "TPU pod, as v5p:4x4x4: plan for it, and compile the real step for it.")
    flags.DEFINE_bool("calibrate", False, "Measure the device at hand first, and plan with what it can do.")
    flags.DEFINE_string("json", "", "Write the plan and its costs here; --sharding_plan reads it back.")
    flags.DEFINE_string("picture", "", "Draw bytes and time of every strategy here, as PNG.")


def model_of(config: RunConfig, workdir: pathlib.Path | None = None) -> ModelConfig:
    """The model that the run would train, under the names that its data gives to tables."""
    if config.data.multi_hot != "none":  # Both ways give bags of the same sizes, and this one holds nothing in memory.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, multi_hot="virtual"))
    return read(config, workdir)[1]


def resident_rows(config: RunConfig, workdir: pathlib.Path | None = None) -> int:
    """Rows of train and val that are to stay on every device; where that is left open, none are planned for."""
    if config.data_on_device != ALWAYS:
        return 0
    splits = read(config, workdir)[0].splits
    return len(splits["train"]) + len(splits["val"])


def hardware_of() -> hardware.Hardware:
    """The hardware to plan for."""
    if FLAGS.calibrate:
        return calibrate()
    if FLAGS.topology:
        return hardware.find(parse_topology(FLAGS.topology).generation)
    if FLAGS.hardware:
        return hardware.find(FLAGS.hardware)
    import jax  # Only now is a device touched.

    return hardware.of_device(jax.devices()[0], jax.local_device_count())


def main() -> None:
    """Flags to setting, setting to costs, costs to the screen, a file and a picture."""
    files.require_output_file("json", FLAGS.json)
    files.require_output_file("picture", FLAGS.picture)
    config = config_from_flags(publishes=True)
    topology = parse_topology(FLAGS.topology) if FLAGS.topology else None
    chosen = sum(int(part.partition(":")[2] or 0) > 0 for part in config.sharding.mesh.split(",") if part)
    num_devices = topology.num_chips if topology else FLAGS.devices or (0 if chosen else 8)
    if num_devices < 0:
        raise ConfigError(f"--devices={num_devices} is not a number of devices")
    mesh = parse_mesh(config.sharding.mesh, num_devices or 2**31, "" if topology else "plan for --devices={0}")
    workdir = pathlib.Path(FLAGS.workdir) if FLAGS.workdir else None
    setting = planner.Setting(
        model=model_of(config, workdir),
        optimizer=config.optimizer,
        mesh=mesh,
        load=dataclasses.replace(load_of(config), resident_rows=resident_rows(config, workdir)),
        hardware=hardware_of(),
        group_size=config.sharding.group_size,
        packed=topology is not None,
    )
    ranked = planner.ranking(setting)
    auto = dict(ranked)[planner.AUTO].plan
    plan = choose_plan(setting.model, config.sharding, mesh, auto)
    cost = setting.cost_of(plan)
    print(report.text(setting, cost, ranked))
    compiled = compile_report(setting, config.loss, cost, topology) if topology else None
    if compiled is not None:
        print(compiled.text())
    if FLAGS.json:
        values = report.as_dict(setting, cost, ranked) | ({"compiled": compiled.to_dict()} if compiled else {})
        reporting.write_json_atomically(pathlib.Path(FLAGS.json), values)
    if FLAGS.picture:
        report.draw(setting, ranked, pathlib.Path(FLAGS.picture))
    if setting.over(cost) > 0 and not config.allow_oversubscription:
        raise ConfigError(planner.does_not_fit(setting, cost))


def command() -> None:
    """The command, as a console script calls it too."""
    define_plan_flags()
    define_run_flags()
    flags.adopt_module_key_flags(run_flags)
    run_command(main)


if __name__ == "__main__":
    command()
