"""Ask a server at a steady rate: `python -m dlrm_jax.loadtest --url=http://127.0.0.1:8000 --qps=500 --candidates=64`.

Open loop: requests leave at moments of a Poisson process that were drawn before the first one, whatever the server
does, and a latency counts from that moment. A client that waits for answers would ask less of a slow server, and see
less of its slowness.
"""

import importlib.util
import json
import pathlib

from absl import flags

from dlrm_jax.cli.commands import run_command
from dlrm_jax.config import ConfigError, how_to_install, require
from dlrm_jax.host import files
from dlrm_jax.training.reporting import write_json_atomically

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("url", "http://127.0.0.1:8000", "The server, with its port.")
    flags.DEFINE_float("qps", 100.0, "Requests a second, on average.")
    flags.DEFINE_integer("candidates", 1, "Rows of a request.")
    flags.DEFINE_float("seconds", 10.0, "How long to ask.")
    flags.DEFINE_enum("api", "binary", ("binary", "json"), "Open Inference Protocol with binary tensors or JSON.")
    flags.DEFINE_integer("connections", 64, "Connections that are held open.")
    flags.DEFINE_integer("seed", 0, "Decides the rows and the moments.")
    flags.DEFINE_string("picture", "", "PNG of latencies over time and their distribution.")
    flags.DEFINE_string("json", "", "File for the numbers.")
    flags.DEFINE_bool("find_max_qps", False, "Look for the highest rate with p99 below --p99_ms and nothing refused.")
    flags.DEFINE_float("p99_ms", 25.0, "What --find_max_qps allows.")


def main() -> None:
    """Flags to requests, answers to a table."""
    missing = [name for name in ("httptools", "uvloop", "flatbuffers") if importlib.util.find_spec(name) is None]
    require(not missing, f"{', '.join(missing)} is not installed: {how_to_install('serve')}")
    from dlrm_jax.serving.http import load_generator as generator

    files.require_output_file("json", FLAGS.json)
    files.require_output_file("picture", FLAGS.picture)
    require(FLAGS.qps > 0 and FLAGS.seconds > 0, "--qps and --seconds must be positive")
    require(FLAGS.candidates >= 1 and FLAGS.connections >= 1, "--candidates and --connections must be at least 1")
    try:
        target = generator.discover(FLAGS.url)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--url={FLAGS.url}: no model to ask ({error}); is the server ready?") from error
    bodies = generator.make_requests(target, FLAGS.candidates, FLAGS.api == "binary", FLAGS.seed)
    if FLAGS.find_max_qps:
        runs = generator.find_max_qps(
            target, bodies, FLAGS.qps, FLAGS.p99_ms / 1e3, FLAGS.seconds, FLAGS.connections, FLAGS.seed
        )
    else:
        runs = [generator.run(target, bodies, FLAGS.qps, FLAGS.seconds, FLAGS.connections, FLAGS.seed)]
    print(generator.format_runs(runs))
    best = generator.best_of(runs, FLAGS.p99_ms / 1e3) if FLAGS.find_max_qps else runs[0]
    facts = {"candidates": FLAGS.candidates, "api": FLAGS.api, **(best.summary() if best else {"qps": 0.0})}
    print(json.dumps(facts))
    if FLAGS.json:
        write_json_atomically(pathlib.Path(FLAGS.json), facts)
    if FLAGS.picture and best:
        generator.draw(best, pathlib.Path(FLAGS.picture))


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main)


if __name__ == "__main__":
    command()
