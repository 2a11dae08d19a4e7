"""What every command shares: parse flags, run, and turn what the user can mend into one line and an exit status."""

import logging
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from dlrm_jax import gpu_atomics, interrupts
from dlrm_jax.config import ConfigError

FLAGS = flags.FLAGS
_LONGEST_LINE = 600


def run_command(main: Callable[[], None]) -> None:
    """Parse flags and run `main`; what the user can mend becomes one line on stderr and exit status 1."""

    def guarded(argv: list[str]) -> None:
        with interrupts.one_line():
            _log_to_stderr()
            gpu_atomics.use_hardware_additions()
            try:
                if len(argv) > 1:
                    raise ConfigError(f"unexpected argument {argv[1]!r}; flags look like --name=value")
                main()
            except (ConfigError, OSError) as error:
                print(f"error: {_shortened(str(error))}", file=sys.stderr)
                sys.exit(1)

    app.run(guarded)


def _shortened(text: str) -> str:
    """One line, whatever a value holds; of a long one the beginning, which says what, and the end, what to do."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 200]} ... {line[-190:]}"


class _BesideProgressBar(logging.Handler):
    """Writes messages above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    # Orbax describes each checkpoint in a hundred lines through absl's logger; ours is a logger of its own.
    if not FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("dlrm_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(_BesideProgressBar())
    logger.propagate = False
