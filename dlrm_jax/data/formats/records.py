"""Bytes of text files: streams of compressed ones and of those in other encodings, and where records end."""

import io
import pathlib
import re

import numpy as np
import pyarrow as pa

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.encoding import UTF8, Decoded, is_utf8
from dlrm_jax.data.formats.source import refuse

CHUNK_BYTES = 16 << 20
_LINE_SEARCH = 1 << 16
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_NEWLINE, _CARRIAGE_RETURN = 10, 13


def open_binary(path: str, encoding: str = UTF8) -> tuple[io.FileIO, pa.NativeFile | Decoded | io.FileIO]:
    """(the file itself, whose position tells the progress, and the stream of its text as UTF-8, uncompressed)."""
    raw = io.FileIO(path)
    magic = raw.read(4)
    raw.seek(0)
    stream: pa.NativeFile | io.FileIO = raw
    for signature, name in _COMPRESSIONS.items():
        if magic.startswith(signature):
            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), name)
    return raw, stream if is_utf8(encoding) else Decoded(stream, encoding)


def read_head(path: str, num_bytes: int, encoding: str = UTF8) -> bytes:
    """The first bytes of a file's text, as UTF-8; ConfigError for what is no file."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--input: {path} is not a file; give files or a glob such as {path}/*")
    try:
        return open_binary(path, encoding)[1].read(num_bytes)
    except (OSError, EOFError) as error:
        refuse(path, error)


def skip(stream: pa.NativeFile | Decoded | io.FileIO, offset: int) -> None:
    """Move a stream to `offset`, reading what cannot be jumped over."""
    if isinstance(stream, io.FileIO):
        stream.seek(offset)
        return
    while offset > 0:
        block = stream.read(min(offset, CHUNK_BYTES))
        if not block:
            raise EOFError("the file is shorter than when it was read before")
        offset -= len(block)


def to_line_end(raw: io.FileIO, num_bytes: int) -> int:
    """`num_bytes` from here on, and the rest of the line that they end in, if it is not too long to be looked for."""
    start = raw.tell()
    raw.seek(num_bytes, io.SEEK_CUR)
    rest = raw.read(_LINE_SEARCH).find(b"\n") + 1
    raw.seek(start)
    return num_bytes + rest


def record_end(data: bytes, quote: bytes, num_records: int = 0) -> int:
    """End of the last whole record in `data`, or of the first `num_records`; 0 if none ends."""
    if not quote or quote not in data:
        return (data.find(b"\n") if num_records else data.rfind(b"\n")) + 1
    ends = record_ends(data, quote)
    if not len(ends):
        return 0
    return int(ends[min(num_records, len(ends)) - 1]) if num_records else int(ends[-1])


def record_ends(data: bytes, quote: bytes) -> np.ndarray:
    """Ends of the whole records: newlines outside quoted fields.

    Where quotes are as RFC 4180 has them, a newline is outside if the quotes before it are even in number; that is
    counted for all at once. A stray quote (5" disk) breaks the rule; then fields are walked one by one.
    """
    buffer = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(buffer == _NEWLINE)
    if not quote or quote not in data:
        return newlines + 1
    mark = quote[0]
    quotes = np.flatnonzero(buffer == mark)
    opens, closes = quotes[0::2], quotes[1::2]
    before = np.where(opens > 0, buffer[opens - 1], _NEWLINE)
    after = np.where(closes + 1 < len(buffer), buffer[np.minimum(closes + 1, len(buffer) - 1)], _NEWLINE)
    beside = np.ones(256, bool)
    beside[[_NEWLINE, _CARRIAGE_RETURN, mark, *b",;|\t"]] = False
    if beside[before].any() or beside[after].any():
        return _walk_records(data, quote)
    return newlines[np.searchsorted(quotes, newlines) % 2 == 0] + 1


def _walk_records(data: bytes, quote: bytes) -> np.ndarray:
    """The plain way: a field is quoted if it begins with a quote; then it ends at the next single quote."""
    q = re.escape(quote)
    token = re.compile(rb"(?:(?<=[,;|\t\n\r])|\A)" + q + rb"(?:[^" + q + rb"]|" + q + q + rb")*(" + q + rb"|\Z)|\n")
    ends = []
    for match in token.finditer(data):
        if match.group() == b"\n":
            ends.append(match.end())
    return np.asarray(ends, np.int64)


def record_starts(data: bytes, quote: bytes) -> list[int]:
    """Where the records that pyarrow sees begin: it passes over empty lines."""
    ends = record_ends(data, quote).tolist()
    starts = [0, *ends] if not ends or ends[-1] < len(data) else [0, *ends[:-1]]
    stops = [*starts[1:], len(data)]
    return [start for start, stop in zip(starts, stops, strict=True) if data[start:stop].strip(b"\r\n")]
