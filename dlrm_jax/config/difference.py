"""How two configs, as JSON values, differ: told to a person in one short line."""

from typing import Any


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Lines `path: ours != theirs` for every leaf in which two JSON-like values differ; a long value is cut."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in sorted(set(ours) | set(theirs)):
            lines += differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        return [
            line for i, pair in enumerate(zip(ours, theirs, strict=True)) for line in differences(*pair, f"{path}[{i}]")
        ]
    return [] if ours == theirs else [f"{_cut(path, _LONGEST_PATH)}: {' != '.join(_told(ours, theirs))}"]


def tell(different: list[str]) -> str:
    """Some lines of `differences` for a person, names first, checksums last: they say that, not what, is different."""
    ends = [line.partition(":")[0].rpartition(".")[2] for line in different]
    order = sorted(range(len(ends)), key=lambda i: (ends[i] != "name", ends[i] == "fingerprint"))
    more = len(different) - _MOST_TOLD
    shown = "; ".join(different[i] for i in order[:_MOST_TOLD])
    return shown + (f"; and {more} more" if more > 0 else "")


_MOST_TOLD = 3
_LONGEST_VALUE, _LONGEST_PATH = 40, 50


def _told(ours: Any, theirs: Any) -> tuple[str, str]:
    """Two values that differ, each in a few words: whole, or counted, or cut around the place where they differ."""
    texts = repr(ours), repr(theirs)
    if max(map(len, texts)) <= _LONGEST_VALUE:
        return texts
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) != len(theirs):
        return f"{len(ours)} of them", f"{len(theirs)} of them"
    equal = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, equal - _LONGEST_VALUE // 4)
    ours_text, theirs_text = (("..." if start else "") + _cut(text[start:], _LONGEST_VALUE) for text in texts)
    return ours_text, theirs_text


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."
