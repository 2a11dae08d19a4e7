"""Guess the label: by its name and its values. Where only a person can tell, the error says what to write."""

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.infer.column import Column, numbers_of
from dlrm_jax.data.schema.schema import Label
from dlrm_jax.data.values.label_values import shown_texts

_LABEL_NAMES = (
    "label",
    "click",
    "clicked",
    "is_click",
    "is_clicked",
    "target",
    "y",
    "conversion",
    "is_conversion",
    "converted",
)
_POSITIVE_WORDS = {
    "no": "yes",
    "n": "y",
    "false": "true",
    "f": "t",
    "negative": "positive",
    "neg": "pos",
    "-": "+",
    "impression": "click",
    "view": "click",
    "dislike": "like",
    "bad": "good",
}
"""The positive word of each known pair, by the negative one; and of `no X`, `not X`, `unX` it is X."""
_NOT = ("no", "not", "non", "un")


def find_label(columns: list[Column], reasons: list[str]) -> Label:
    """The label's column and its positive values; ConfigError with what to write where the log does not tell."""
    named = [column for name in _LABEL_NAMES for column in columns if "_".join(column.words) == name]
    refused = []
    for column in named:
        label, reason = _usable(column)
        if label is not None:
            reasons.append(f"{column.name} is the label by its name and its values {reason}")
            return label
        refused.append(f"column {column.name} {reason}")
    binary = [column for column in columns if _is_binary(column)]
    if refused:
        others = f"; {', '.join(c.name for c in binary[:8])} hold 0 and 1 (label: {binary[0].name})" if binary else ""
        raise ConfigError(f"cannot tell the label: {'; '.join(refused)}{others}; see README, Your own log")
    if len(binary) == 1:
        reasons.append(f"{binary[0].name} is the label: the only column of 0 and 1")
        return Label(binary[0].name)
    if binary and binary[0] is columns[0]:
        reasons.append(f"{binary[0].name} is the label: the first column, and it holds 0 and 1")
        return Label(binary[0].name)
    which = f"{len(binary)} columns hold 0 and 1 ({', '.join(c.name for c in binary[:8])})"
    if not binary:
        names = ", ".join(_LABEL_NAMES[:4])
        which = f"no column is called {names} or holds both 0 and 1 and nothing else{_nearly(columns)}"
    raise ConfigError(f"cannot tell the label: {which}; write a schema file that names it (see README, Your own log)")


def _nearly(columns: list[Column]) -> str:
    """Columns that may be meant: those of two values, and those of 0 or 1 alone."""
    said = []
    for column in columns:
        texts = sorted(column.distinct_texts)[:3]
        if not column.is_list and (len(texts) == 2 or texts in (["0"], ["1"])):
            said.append(f"{column.name} only {' and '.join(map(repr, texts))}")
    return f" ({', '.join(said[:5])[:300]})" if said else ""


def _is_binary(column: Column) -> bool:
    """Whether both 0 and 1 are there, and nothing else."""
    if column.is_boolean:
        return column.distinct == 2
    numbers = numbers_of(column) if column.distinct <= 6 else None  # "1", "1.0", " 1" are one number.
    return numbers is not None and set(np.unique(numbers)) == {0.0, 1.0}


def _usable(column: Column) -> tuple[Label | None, str]:
    """(the label that a column called like one is, its values; or None, and why it is none and what to write)."""
    name = column.name
    if column.is_list:
        return None, "is called like a label, but holds lists"
    if _is_binary(column):
        return Label(name), "0 and 1" if not column.is_boolean else "false and true"
    numbers = numbers_of(column)
    if numbers is not None and len(numbers):
        values = np.unique(numbers)
        if set(values) == {-1.0, 1.0}:
            return Label(name, threshold=0.0), "-1 and 1"
        shown = ", ".join(f"{value:g}" for value in values[:8]) + (", ..." if len(values) > 8 else "")
        if len(values) == 1:
            return None, f"is called like a label, but its first {len(numbers):,} rows hold only {shown}"
        return None, (
            f"is called like a label, but holds {len(values):,} numbers ({shown}); if those from some number on are "
            f"positive, write in a schema file label: {{column: {name}, threshold: {values[-1]:g}}}"
        )
    return _usable_texts(column)


def _usable_texts(column: Column) -> tuple[Label | None, str]:
    name = column.name
    spelled: dict[str, list[str]] = {}
    for text in sorted(column.distinct_texts):
        spelled.setdefault(text.strip().casefold(), []).append(text.strip())
    if not spelled:
        return None, "is called like a label, but has no values"
    if len(spelled) == 2:
        words = sorted(spelled)
        positive = next((word for word in words if word in _positive_of(words[word == words[0]])), "")
        if positive:
            texts = tuple(dict.fromkeys(spelled[positive]))
            return Label(name, positive=texts), f"{words[0]} and {words[1]}; {texts[0]!r} is positive, please check"
    shown = shown_texts({text: column.texts.count(text) for text in sorted(column.distinct_texts)[:50]})
    ways = [f"label: {{column: {name}, positive: [{texts[0]!r}]}}" for texts in spelled.values()]
    if len(spelled) == 1:
        return None, f"is called like a label, but holds only {shown}"
    if len(spelled) == 2:
        return None, f"holds {shown}, and nothing says which is positive; write in a schema file {' or '.join(ways)}"
    return None, (
        f"is called like a label, but holds {len(spelled):,} texts: {shown}; name the positive ones in a schema file, "
        f"as {ways[0]}"
    )


def _positive_of(negative: str) -> tuple[str, ...]:
    """What is positive if `negative` is not."""
    opposite = [negative.removeprefix(word).lstrip(" _-") for word in _NOT if negative.startswith(word)]
    return tuple(filter(None, (_POSITIVE_WORDS.get(negative, ""), *opposite)))
