"""What a request can get wrong, or come at a bad time for; the server turns each into a status (app.py)."""

import itertools
import reprlib
from typing import Any


class BadRequest(ValueError):
    """A request that the client must change; the text names the field and the value."""


class Busy(RuntimeError):
    """More requests than the queue takes; `retry_after` seconds are a fair wait."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLate(RuntimeError):
    """A request whose time ran out before it was scored."""


class _Short(reprlib.Repr):
    """A `repr` whose work is bounded too, whatever the value's size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxother = 3, 8, 4, 76, 76

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Without the sorting of all keys."""
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)


_SHORT = _Short()


def shown(value: object) -> str:
    """A value for an error text, cut to a length that fits one line."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
