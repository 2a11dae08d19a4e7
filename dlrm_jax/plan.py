"""Plan a run before it is made: `python -m dlrm_jax.plan --flagfile=FILE --devices=8 --hardware=h100`.

Nothing is allocated; with --hardware no accelerator is touched. The table says where each embedding table lies and
why, what a device holds and sends, how long a step should take, and how the other strategies compare.
"""

from absl import flags

from dlrm_jax.api.planning import plan_of
from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.flags import define_run_flags
from dlrm_jax.host import files
from dlrm_jax.planning import hardware

FLAGS = flags.FLAGS


def define_plan_flags() -> None:
    """Define this command's own flags."""
    flags.DEFINE_integer("devices", 0, "Devices to plan for; 0: those of --mesh or --topology, else 8.")
    flags.DEFINE_string("hardware", "", f"What they are: {', '.join(hardware.HARDWARE)}. Default: the device at hand.")
    flags.DEFINE_string("topology", "", "TPU pod, as v5p:4x4x4: plan for it, and compile the real step for it.")
    flags.DEFINE_bool("calibrate", False, "Measure the device at hand first, and plan with what it can do.")
    flags.DEFINE_string("json", "", "Write the plan and its costs here; --sharding_plan reads it back.")
    flags.DEFINE_string("picture", "", "Draw bytes and time of every strategy here, as PNG.")


def main() -> None:
    """Flags to a plan, the plan to the screen, a file and a picture."""
    files.require_output_file("json", FLAGS.json)
    files.require_output_file("picture", FLAGS.picture)
    plan = plan_of(FLAGS, FLAGS.devices, FLAGS.hardware, FLAGS.topology, FLAGS.calibrate)
    print(plan)
    if FLAGS.json:
        plan.to_json(FLAGS.json)
    if FLAGS.picture:
        plan.plot(FLAGS.picture)
    if not FLAGS.allow_oversubscription:
        plan.require_fitting()


def command() -> None:
    """The command, as a console script calls it too."""
    define_plan_flags()
    define_run_flags()
    run_command(main)


if __name__ == "__main__":
    command()
