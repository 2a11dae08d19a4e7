"""Commands in this process: what each prints, without the seconds that a start of Python and JAX takes."""

import contextlib
import importlib
import io
from collections.abc import Iterator, Sequence

from absl import flags

from dlrm_jax.cli import flags as run_flags

_DEFINE = {
    "tune": ("define_tune_flags",),
    "train": ("define_process_flags", "define_seed_flags"),
    "plan": ("define_plan_flags",),
    "benchmark": ("define_benchmark_flags",),
}
"""Those that take the flags of a run, and the function of their own; the others have `define_flags` alone."""


def _ours() -> dict[str, flags.Flag]:
    """The flags that are not absl's own."""
    owner = flags.FLAGS.find_module_defining_flag
    return {name: flags.FLAGS[name] for name in flags.FLAGS if not str(owner(name)).startswith("absl.")}


@contextlib.contextmanager
def defined(command: str) -> Iterator[None]:
    """absl's one set of flags, which holds what the command defines for the length of the block."""
    before = _ours()
    module = importlib.import_module(f"dlrm_jax.{command}")
    for name in before:
        delattr(flags.FLAGS, name)
    try:
        if command in _DEFINE:
            run_flags.define_run_flags()
        for define in _DEFINE.get(command, ("define_flags",)):
            getattr(module, define)()
        yield
    finally:
        flags.FLAGS.unparse_flags()
        for name in _ours():
            delattr(flags.FLAGS, name)
        for name, flag in before.items():
            flags.FLAGS[name] = flag


def call(command: str, *arguments: str, words: Sequence[str] = ()) -> str:
    """What `python -m dlrm_jax.COMMAND` prints to stdout, `words` behind its flags; raises what its main raises."""
    with defined(command), contextlib.redirect_stdout(io.StringIO()) as out:
        rest = flags.FLAGS([command, *arguments])
        assert len(rest) == 1, rest
        importlib.import_module(f"dlrm_jax.{command}").main(*words)
    return out.getvalue()
