"""Ctrl-C ends a command with one line and status 130, whenever it comes: while modules load, at work, at the end.

Python's own way is a traceback of wherever it happened to be, which it is of use to nobody to read.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

STATUS = 128 + signal.SIGINT
_TEXT = "interrupted"


def runs_a_command() -> bool:
    """Whether this process was started as `python -m dlrm_jax.NAME` or `dlrm-NAME`, and is still loading modules."""
    # Until runpy has found the module its argv begins with "-m": no other importer of this package sees that.
    if sys.argv[:1] == ["-m"]:
        return "dlrm_jax." in sys.orig_argv[-len(sys.argv)]
    return os.path.basename(sys.argv[0] if sys.argv else "").startswith("dlrm-")


def end_at_once() -> None:
    """From here on Ctrl-C ends the process as it stands, unless whoever started it wants Ctrl-C ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Within, Ctrl-C unwinds what is at work, as KeyboardInterrupt, and then ends the process; after it, at once."""
    heeded = signal.getsignal(signal.SIGINT) in (_end, signal.default_int_handler)
    sys.unraisablehook = _unraisable
    try:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except BaseException as error:
        if _comes_of_interrupt(error):
            _end(signal.SIGINT, None)
        raise
    finally:
        if heeded:
            signal.signal(signal.SIGINT, _end)


def _comes_of_interrupt(error: BaseException | None) -> bool:
    """Whether it is a KeyboardInterrupt, or what a library made of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _unraisable(unraisable: Any) -> None:
    """A KeyboardInterrupt that came where Python can only drop it, as in a destructor, ends the process too."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)


def _end(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # One line is enough, however often it is pressed.
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, f"{_TEXT}\n".encode())
    os._exit(STATUS)
