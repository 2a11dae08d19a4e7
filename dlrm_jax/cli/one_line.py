"""What can be mended by who typed it, in one line: flags that cannot be read, the system's errors."""

import re

from absl import flags

_LONGEST_LINE = 600


def of_flags(error: flags.Error) -> str:
    """What absl says of flags that cannot be read."""
    if isinstance(error, flags.CantOpenFlagFileError):
        return f"--flagfile: {without_number(str(error).partition('flagfile: ')[2] or str(error))}"
    return shortened(str(error))


def of_system(error: OSError) -> str:
    """The system's own words without their number, and with the file first."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*([" -> ".join(names)] if names else []), str(error.strerror)])


def without_number(text: str) -> str:
    """A text without the system's number of an error."""
    return re.sub(r"\[Errno -?\d+\] ", "", text)


def shortened(text: str) -> str:
    """One line, whatever a value holds; of a long one the beginning, which says what, and the end, what to do."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 200]} ... {line[-190:]}"
