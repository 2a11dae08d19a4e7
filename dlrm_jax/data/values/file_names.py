"""Names of columns and tables as names of files: safe on every disk, and two names never one file."""

import hashlib
import pathlib
import urllib.parse
from collections.abc import Iterable

MAX_BYTES = 150
"""Of a name that is kept whole; file systems take 255 bytes, and suffixes follow."""


def file_names(names: Iterable[str]) -> dict[str, str]:
    """The file name of each name, without suffix.

    Letters, digits and `_.-` stay, all else is percent-encoded (urllib.parse.unquote is the way back). A name that is
    too long, or that differs from an earlier one by upper and lower case alone, ends in `~` and its hash.
    """
    out: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        safe = _encoded(name)
        if len(safe) > MAX_BYTES or safe.lower() in taken or not safe:
            safe = f"{safe[:MAX_BYTES]}~{hashlib.sha256(_bytes(name)).hexdigest()[:16]}"
        taken.add(safe.lower())
        out[name] = safe
    return out


def existing_file(directory: pathlib.Path, name: str, safe: str, suffix: str) -> pathlib.Path:
    """The file of a name; that which has the name itself, as datasets had them before, where there is no other."""
    path = directory / f"{safe}{suffix}"
    if not path.exists() and safe != name and "/" not in name and "\0" not in name:
        before = directory / f"{name}{suffix}"
        return before if len(_bytes(before.name)) <= 255 and before.exists() else path
    return path


def _bytes(name: str) -> bytes:
    return name.encode("utf8", "surrogatepass")


def _encoded(name: str) -> str:
    safe = urllib.parse.quote(_bytes(name), safe="").replace("~", "%7E")
    return "%2E" + safe[1:] if safe.startswith(".") else safe
