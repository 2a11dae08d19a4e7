"""What every command shares: parse flags, run, and turn what the user can mend into one line and an exit status."""

import contextlib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from dlrm_jax.config import ConfigError
from dlrm_jax.host import gpu_atomics, interrupts, memory

FLAGS = flags.FLAGS
_LONGEST_LINE = 600
_OF_OTHER_READS = ("Event loop is closed", "Encountered error while reading array index")
"""What Orbax's coroutines raise where nobody awaits them, in dozens of lines each."""


def run_command(main: Callable[[], None]) -> None:
    """Parse flags and run `main`; what the user can mend becomes one line on stderr and exit status 1."""

    def guarded(argv: list[str]) -> None:
        with interrupts.one_line():
            _log_to_stderr()
            _say_once_that_reading_failed()
            gpu_atomics.use_hardware_additions()
            memory.end_in_one_line()
            try:
                memory.require_threads()
                if len(argv) > 1:
                    raise ConfigError(f"unexpected argument {argv[1]!r}; flags look like --name=value")
                main()
            except Exception as error:
                print(f"error: {_shortened(_say_or_raise(error))}", file=sys.stderr)
                _end_at_once()

    app.run(guarded, flags_parser=_parse_flags)


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


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing; what it refuses is one line too."""
    try:
        return FLAGS(argv)
    except flags.CantOpenFlagFileError as error:
        reason = str(error).partition("flagfile: ")[2] or str(error)
        print(f"error: --flagfile: {_without_number(reason)}", file=sys.stderr)
        sys.exit(1)
    except flags.Error as error:
        print(f"error: {_shortened(str(error))} (--help lists the flags)", file=sys.stderr)
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
    if isinstance(error, ConfigError | OSError):
        return _say(error)
    raise error


def _say(error: ConfigError | OSError) -> str:
    """An error in words; the system's own without its number, and with the file first."""
    if not isinstance(error, OSError) or not error.strerror:
        return _without_number(str(error))
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([" -> ".join(names), error.strerror]) if names else error.strerror


def _without_number(text: str) -> str:
    return re.sub(r"\[Errno -?\d+\] ", "", text)


def _shortened(text: str) -> str:
    """One line, whatever a value holds; of a long one the beginning, which says what, and the end, what to do."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 200]} ... {line[-190:]}"


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
