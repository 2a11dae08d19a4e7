"""Serve an exported model over HTTP: `python -m dlrm_jax.serve --model=models/quickstart --port=8000`."""

import functools
import importlib.util
import pathlib
import typing

from absl import flags

from dlrm_jax.cli.commands import run_command
from dlrm_jax.config import ConfigError, how_to_install, require
from dlrm_jax.host import files, memory
from dlrm_jax.host.formulations import NATIVE, XLA
from dlrm_jax.tables.forms import FORMS

if typing.TYPE_CHECKING:
    from dlrm_jax.serving.artifact.loaded import Engine, MakeEngine
    from dlrm_jax.serving.artifact.store import Version

FLAGS = flags.FLAGS
_NATIVE_INT8 = "native_int8"
_NEEDED = ("starlette", "uvicorn", "httptools", "uvloop", "orjson", "prometheus_client", "flatbuffers")


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string(
        "model", None, "Directory that dlrm_jax.export wrote; its latest version is served.", required=True
    )
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; by default only this machine can ask.")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0: a free one, which the log names.")
    flags.DEFINE_list("batch_sizes", [], "Batch sizes that are compiled ahead; default 1,4,16,...,2048.")
    flags.DEFINE_float("max_delay_ms", 0.0, "How long a batch waits for more requests while the model is idle.")
    flags.DEFINE_integer("max_queued_rows", 8192, "Rows that may wait; a request beyond is refused at once (429).")
    flags.DEFINE_float(
        "max_wait_ms",
        50.0,
        "A request that would wait longer for its turn is refused at once (429).",
    )
    flags.DEFINE_integer("max_rows", 4096, "Rows of one request.")
    flags.DEFINE_integer("max_bag", 1000, "Values of one bag in a raw row.")
    flags.DEFINE_integer("max_body_bytes", 4 << 20, "Bytes of one request's body.")
    flags.DEFINE_integer(
        "max_connections",
        2000,
        "Connections; one beyond takes the place of the one that is idle the longest, or gets 503.",
    )
    flags.DEFINE_float("request_seconds", 1.0, "A request that is not scored by then is answered 503.")
    flags.DEFINE_float("body_seconds", 10.0, "A request whose body has not come by then is answered 408.")
    flags.DEFINE_float("poll_seconds", 5.0, "How often to look for a newer version; SIGHUP looks at once.")
    flags.DEFINE_float("drain_seconds", 10.0, "After SIGTERM, how long open requests may take.")
    flags.DEFINE_string(
        "mesh",
        "",
        "Devices that share the tables, as model:4 or data:2,model:4 (two copies); default: the first.",
    )
    flags.DEFINE_enum("sharding", "auto", (*FORMS.all(), "auto"), "With --mesh: how tables lie on it, as in training.")
    flags.DEFINE_string("sharding_plan", "", "With --mesh: JSON file that places single tables otherwise.")
    flags.DEFINE_enum(
        "kernels",
        XLA,
        (XLA, NATIVE, _NATIVE_INT8),
        "Who scores: the exported program, or, on a CPU, C++ that is compiled at the first use; native_int8: C++ with "
        "int8 layers, of a version that was exported with --int8_layers.",
    )
    flags.DEFINE_bool("allow_oversubscription", False, memory.TRY_ANYWAY_HELP)
    flags.DEFINE_string("token_file", "", "File with a token that every request but health must bear.")
    flags.DEFINE_string("tls_cert", "", "Certificate (PEM) for HTTPS.")
    flags.DEFINE_string("tls_key", "", "Its key (PEM).")
    flags.DEFINE_bool("access_log", False, "Log every request: path, status, milliseconds.")
    flags.DEFINE_enum(
        "log_level", "info", ("debug", "info", "warning", "error"), "Which events are logged; debug: bad requests."
    )


def main() -> None:
    """Flags to settings, settings to a server."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    require(not missing, f"{', '.join(missing)} is not installed: {how_to_install('serve')}")
    from dlrm_jax.serving.artifact.loaded import BATCH_SIZES
    from dlrm_jax.serving.http.asgi import Limits
    from dlrm_jax.serving.http.server import Settings, run_server

    limits = Limits(FLAGS.max_body_bytes, FLAGS.max_rows, FLAGS.request_seconds, FLAGS.body_seconds)
    for name in ("max_queued_rows", "max_rows", "max_bag", "max_body_bytes", "max_connections"):
        require(FLAGS[name].value >= 1, f"--{name} is {FLAGS[name].value}; it must be at least 1")
    for name in ("max_wait_ms", "request_seconds", "body_seconds", "poll_seconds"):
        require(FLAGS[name].value > 0, f"--{name} is {FLAGS[name].value}; it must be positive")
    require(FLAGS.max_delay_ms >= 0, f"--max_delay_ms is {FLAGS.max_delay_ms}; it must not be negative")
    require(bool(FLAGS.tls_cert) == bool(FLAGS.tls_key), "--tls_cert and --tls_key go together: give both or none")
    for name in ("token_file", "tls_cert", "tls_key", "sharding_plan"):
        files.require_input_file(name, FLAGS[name].value)
    batch_sizes = _batch_sizes() or BATCH_SIZES
    run_server(
        Settings(
            model_dir=pathlib.Path(FLAGS.model),
            host=FLAGS.host,
            port=FLAGS.port,
            batch_sizes=batch_sizes,
            max_delay=FLAGS.max_delay_ms / 1e3,
            max_queued_rows=FLAGS.max_queued_rows,
            max_wait=FLAGS.max_wait_ms / 1e3,
            max_bag=FLAGS.max_bag,
            poll_seconds=FLAGS.poll_seconds,
            drain_seconds=FLAGS.drain_seconds,
            max_connections=FLAGS.max_connections,
            limits=limits,
            token=_token(),
            tls_cert=FLAGS.tls_cert,
            tls_key=FLAGS.tls_key,
            log_level=FLAGS.log_level,
            access_log=FLAGS.access_log,
            make_engine=_make_engine(batch_sizes[-1]),
        )
    )


def _batch_sizes() -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(size) for size in FLAGS.batch_sizes}))
    except ValueError:
        raise ConfigError(
            f"--batch_sizes={','.join(FLAGS.batch_sizes)} is not a list of numbers, as 1,16,256"
        ) from None
    require(not sizes or sizes[0] >= 1, f"--batch_sizes={','.join(FLAGS.batch_sizes)}: a batch has at least one row")
    return sizes


def _make_engine(largest_batch: int) -> "MakeEngine":
    from dlrm_jax.serving.artifact.loaded import OneDevice, require_room

    oversubscribe = FLAGS.allow_oversubscription
    if not FLAGS.mesh:
        for name in ("sharding", "sharding_plan"):
            require(not FLAGS[name].present, f"--{name} places tables on several devices: give --mesh=model:N too")
        make: MakeEngine = functools.partial(OneDevice, apart=True)
        native = FLAGS.kernels != XLA
        if native:
            from dlrm_jax.serving.artifact.native import NativeCpu, native_int8

            make = NativeCpu if FLAGS.kernels == NATIVE else native_int8

        def with_room(version: "Version", like: "Engine | None") -> "Engine":
            with memory.named(*require_room(version, native or None, oversubscribe)):
                return make(version, like)

        return with_room
    require(FLAGS.kernels == XLA, f"--kernels={FLAGS.kernels} scores on one device: leave it or --mesh out")
    from dlrm_jax.serving.artifact.placed import engine_maker
    from dlrm_jax.training.options import ShardingOptions

    options = ShardingOptions(sharding=FLAGS.sharding, plan=FLAGS.sharding_plan, mesh=FLAGS.mesh)
    return engine_maker(options, largest_batch, oversubscribe)


def _token() -> str:
    if not FLAGS.token_file:
        return ""
    token = pathlib.Path(FLAGS.token_file).read_text().strip()
    require(bool(token), f"--token_file: {FLAGS.token_file} is empty")
    return token


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main)


if __name__ == "__main__":
    command()
