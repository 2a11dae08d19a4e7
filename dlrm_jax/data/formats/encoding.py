"""Text files in other encodings than UTF-8: told by their first bytes, and read as if they were UTF-8."""

import codecs
import re
from typing import Protocol

from dlrm_jax.config import ConfigError

UTF8 = "utf8"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_BLOCK_BYTES = 1 << 20
_WRONG = 0xFF
"""Never a byte of UTF-8: marks what could not be decoded, so that its record is refused as any that is no UTF-8."""
_UNDEFINED_IN_CP1252 = b"\x81\x8d\x8f\x90\x9d"


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, num_bytes: int) -> bytes:
        """At most so many bytes; none at the end."""


def is_utf8(encoding: str) -> bool:
    """Whether bytes of this encoding need no decoding."""
    return codecs.lookup(encoding).name == "utf-8"


def require_encoding(encoding: str) -> None:
    """ConfigError for a name that Python does not know as an encoding of text."""
    try:
        "a".encode(encoding)  # Refuses what is no encoding of text, as base64.
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):
        raise ConfigError(
            f"schema: encoding is {encoding!r}; write utf8, cp1252 (Windows and Excel in the West), latin-1, utf-16 "
            "(Excel's Unicode text), or another name that Python knows"
        ) from None


class Decoded:
    """The text of a stream, as UTF-8; what cannot be decoded becomes byte 0xff and a letter that tells its value."""

    def __init__(self, stream: Readable, encoding: str) -> None:
        self._stream, self._encoding = stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("dlrm_jax.mark")
        self._rest = b""
        self._ended = False

    def read(self, num_bytes: int) -> bytes:
        """So many bytes; fewer only at the end."""
        parts, held = [self._rest], len(self._rest)
        while held < num_bytes and not self._ended:
            block = self._stream.read(_BLOCK_BYTES)
            self._ended = not block
            try:
                text = self._decoder.decode(block, self._ended)
            except UnicodeError as error:  # As utf-16 without a byte order mark.
                raise OSError(f"the file is not {self._encoding}: {error}; see encoding in its schema") from None
            parts.append(text.encode(UTF8, "surrogateescape"))
            held += len(parts[-1])
        data = b"".join(parts)
        self._rest = data[num_bytes:]
        return data[:num_bytes]


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    # An escaped byte is written as it is; the letter cannot be taken for a newline, a quote or a delimiter.
    return chr(0xDC00 + _WRONG) + chr(0x100 + error.object[error.start]), max(error.end, error.start + 1)


codecs.register_error("dlrm_jax.mark", _mark)


def describe_wrong(record: bytes, start: int, encoding: str) -> str:
    """What is wrong with a record whose byte at `start` is no UTF-8."""
    if is_utf8(encoding):
        return f"byte 0x{record[start]:02x} is not UTF-8"
    letter = record[start + 1 : start + 3].decode(UTF8, "ignore")
    value = f"byte 0x{ord(letter) - 0x100:02x}" if letter and ord(letter) >= 0x100 else "a byte"
    return f"{value} is not {encoding}"


def guess_encoding(head: bytes) -> tuple[str, str]:
    """(encoding, why) of a file by its first bytes; nothing to say of ASCII and plain UTF-8."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, "its byte order mark"
    if head.startswith(BYTE_ORDER_MARK):
        return UTF8, "its byte order mark"
    for first, name in ((0, "utf-16-be"), (1, "utf-16-le")):
        if (
            len(head) >= 4
            and head[first::2].count(0) > 0.6 * len(head[first::2])
            and 0 not in head[1 - first :: 2][:64]
        ):
            return name, "a zero in every second byte"
    wrong = _wrong_bytes(head)
    if not wrong or len(wrong) < _num_long(head):
        return UTF8, ""  # Some damaged rows in a file of UTF-8 are told of when they are reached.
    if any(byte in wrong for byte in _UNDEFINED_IN_CP1252):
        return "latin-1", f"byte 0x{wrong[0]:02x} and others, which are not UTF-8"
    return "cp1252", f"byte 0x{wrong[0]:02x}, which is not UTF-8 and is {bytes([wrong[0]]).decode('cp1252')!r} in it"


def _wrong_bytes(head: bytes) -> bytes:
    """The bytes that are no part of UTF-8, but for a letter that the end of `head` may cut."""
    text = codecs.getincrementaldecoder(UTF8)("surrogateescape").decode(head)
    return bytes(ord(letter) - 0xDC00 for letter in re.findall("[\udc80-\udcff]", text))


def _num_long(head: bytes) -> int:
    """How many letters of more than one byte UTF-8 finds in `head`."""
    return len(re.findall("[^\x00-\x7f]", head.decode(UTF8, "ignore")))
