"""Commands as processes that begin with their libraries loaded: each is a fork of one that did nothing but load them.

To load JAX, Flax, Orbax and Arrow takes three seconds of a processor, most of what a command takes that ends in an
error. What a start of Python does by itself is left to tests that start one.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NoReturn

from tests.helpers import ROOT


@functools.cache
def _parent(read_by_jax: frozenset[tuple[str, str]]) -> subprocess.Popen:
    """One for each of these settings in the environment, which JAX reads when it is loaded."""
    command = [sys.executable, "-c", "from tests.forked import serve; serve()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run(module: str, *flags: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `python -m dlrm_jax.MODULE FLAGS` leaves, its working directory being `cwd`."""
    parent = _parent(frozenset(item for item in os.environ.items() if item[0].startswith(("JAX_", "XLA_"))))
    assert parent.stdin is not None and parent.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        out, err = (pathlib.Path(directory) / name for name in ("out", "err"))
        asked = [module, flags, dict(os.environ), str(cwd), str(out), str(err)]
        print(json.dumps(asked), file=parent.stdin, flush=True)
        status = int(parent.stdout.readline())
        return subprocess.CompletedProcess([module, *flags], status, out.read_text(), err.read_text())


def serve() -> None:
    """Fork for each line of standard input; only the child of such a line returns."""
    import flax.linen  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401

    import dlrm_jax.api.training  # noqa: F401

    for line in sys.stdin:
        module, flags, environment, *paths = json.loads(line)
        pid = os.fork()
        if not pid:
            os.environ.update(environment)
            _become(module, flags, *paths)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(module: str, flags: list[str], cwd: str, out: str, err: str) -> NoReturn:
    import runpy

    for path, number in (("/dev/null", 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    sys.argv = [module, *flags]
    status = 0
    try:
        runpy.run_module(f"dlrm_jax.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(status)
