"""What every command shares: parse flags, run, and turn what the user can mend into one line and an exit status."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from dlrm_jax.cli import help, one_line
from dlrm_jax.config import ConfigError
from dlrm_jax.host import gpu_atomics, interrupts, memory

FLAGS = flags.FLAGS
_OF_OTHER_READS = ("Event loop is closed", "Encountered error while reading array index")
"""What Orbax's coroutines raise where nobody awaits them, in dozens of lines each."""


def run_command(main: Callable[..., None], words: bool = False) -> None:
    """Parse flags and run `main`; what the user can mend becomes one line on stderr and exit status 1.

    With `words` it gets what stands behind the flags; else nothing may.
    """

    def guarded(argv: list[str]) -> None:
        with interrupts.one_line():
            _log_to_stderr()
            _say_once_that_reading_failed()
            gpu_atomics.use_hardware_additions()
            memory.end_in_one_line()
            try:
                memory.require_threads()
                if len(argv) > 1 and not words:
                    raise ConfigError(f"unexpected argument {argv[1]!r}; flags look like --name=value")
                main(*argv[1:])
            except Exception as error:
                print(f"error: {one_line.shortened(_say_or_raise(error))}", file=sys.stderr)
                _end_at_once()

    app.run(guarded, flags_parser=functools.partial(_parse_flags, main.__module__))


def _end_at_once() -> NoReturn:
    """Exit status 1 without the libraries' own ends: Arrow's threads abort the process in one of fifty of them.

    Everything of ours was unwound on the way here; several processes, which end for the same reason, part first.
    """
    if "jax" in sys.modules:  # Preparation has none, and is alone.
        from dlrm_jax.host import processes

        processes.leave()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def _parse_flags(module: str, argv: list[str]) -> list[str]:
    """absl's parsing; what it refuses is one line too. `module` is the command's, whose help is asked for."""
    for word in argv[1:]:
        if word in help.WORDS:
            with contextlib.suppress(BrokenPipeError):  # Where who reads it has seen enough.
                print(help.text(module, short=help.WORDS[word]), flush=True)
            os._exit(0)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        further = "" if isinstance(error, flags.CantOpenFlagFileError) else " (--help lists the flags)"
        print(f"error: {one_line.of_flags(error)}{further}", file=sys.stderr)
        sys.exit(1)


def _say_once_that_reading_failed() -> None:
    """Where one of a checkpoint's reads fails, which is told, Orbax leaves the others behind, begun or not."""
    sys.unraisablehook = functools.partial(_quiet_when_reading_failed, sys.unraisablehook)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _quiet_when_reading_failed(
    otherwise: Callable[["sys.UnraisableHookArgs"], Any], unraisable: "sys.UnraisableHookArgs"
) -> None:
    """Drop what a checkpoint's other reads say when one has failed, which is told, and Orbax's event loop is gone."""
    error = unraisable.exc_value
    if not str(error).startswith(_OF_OTHER_READS):
        otherwise(unraisable)


def _say_or_raise(error: Exception) -> str:
    """What the user can mend, in words; anything else is raised."""
    if memory.is_exhausted(error):
        return f"{memory.ran_out(error)}; a smaller model, batch or data set would fit"
    if isinstance(error, OSError) and error.strerror:
        return one_line.of_system(error)
    if isinstance(error, ConfigError | OSError):
        return one_line.without_number(str(error))
    raise error


class _BesideProgressBar(logging.Handler):
    """Writes messages above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    # Orbax describes each checkpoint in a hundred lines through absl's logger; ours is a logger of its own. What Orbax
    # logs as an error it also raises, and then it is told once.
    if not FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.FATAL)
    logger = logging.getLogger("dlrm_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(_BesideProgressBar())
    logger.propagate = False
