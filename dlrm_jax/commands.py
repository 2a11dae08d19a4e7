"""What every command shares: parse flags, run, and turn what the user can mend into one line and an exit status."""

import logging
import signal
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from dlrm_jax import gpu_atomics, memory
from dlrm_jax.config import ConfigError

FLAGS = flags.FLAGS


def run_command(main: Callable[[], None]) -> None:
    """Parse flags and run `main`; what the user can mend becomes one line on stderr and exit status 1."""

    def guarded(argv: list[str]) -> None:
        _log_to_stderr()
        gpu_atomics.use_hardware_additions()
        memory.end_in_one_line()
        try:
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}; flags look like --name=value")
            main()
        except Exception as error:
            exhausted = memory.is_exhausted(error)
            if not exhausted and not isinstance(error, ConfigError | OSError):
                raise
            text = f"{memory.ran_out(error)}; a smaller model, batch or data set would fit" if exhausted else str(error)
            print(f"error: {' '.join(text.split())}", file=sys.stderr)  # One line, whatever a value holds.
            sys.exit(1)
        except KeyboardInterrupt:
            # Before training, and the second Ctrl-C: what was saved is whole, what was not is lost.
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    app.run(guarded)


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
