"""What a request can get wrong, or come at a bad time for; the server turns each into a status (server.py)."""


class BadRequest(ValueError):
    """A request that the client must change; the text names the field and the value."""


class Busy(RuntimeError):
    """More requests than the queue takes; `retry_after` seconds are a fair wait."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLate(RuntimeError):
    """A request whose time ran out before it was scored."""


def shown(value: object) -> str:
    """A value for an error text, cut to a length that fits one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
