"""What a guess looks at: a column's first values, and the words of its name."""

import dataclasses
import functools
import re

import numpy as np
import pyarrow as pa

from dlrm_jax.data.values.columns import to_numbers

MANY = 1000
"""Rows from which on shares mean something."""
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?([eE][+-]?\d+)?")
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")


@dataclasses.dataclass
class Column:
    """What a sample says of one column."""

    name: str
    values: list
    """Texts, numbers, lists or None."""
    is_list: bool
    texts: list[str]
    """Those that are there, as text; lists joined."""
    is_boolean: bool = False

    @functools.cached_property
    def distinct_texts(self) -> set[str]:
        """The different ones."""
        return set(self.texts)

    def set_texts(self, texts: list[str]) -> None:
        """Look at these texts from now on."""
        self.texts = texts
        self.__dict__.pop("distinct_texts", None)

    @property
    def distinct(self) -> int:
        """How many different ones."""
        return len(self.distinct_texts)

    @property
    def distinct_share(self) -> float:
        """Of the values that are there."""
        return self.distinct / max(len(self.texts), 1)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The words of the name in lower case: userId, user_id and "User ID" are user and id."""
        return tuple(word.lower() for word in _WORDS.findall(self.name))


def make_column(name: str, values: list) -> Column:
    """A column of a sample's values."""
    is_list = any(isinstance(value, list) for value in values)
    if is_list:
        texts = ["\x1f".join(map(_text, value)) for value in values if isinstance(value, list)]
    else:
        texts = [_text(value) for value in values if value is not None and value != "" and value == value]
    return Column(name, values, is_list, texts, any(isinstance(value, bool) for value in values))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)  # As Arrow and JSON write them.


def numbers_of(column: Column) -> np.ndarray | None:
    """The values as numbers, None if most are none."""
    if column.is_list or not column.texts:
        return None
    numbers, wrong = to_numbers(pa.array(column.texts))
    return numbers[~wrong] if wrong.mean() <= 0.001 else None


def is_numeric(column: Column) -> bool:
    """Whether its values are numbers."""
    return numbers_of(column) is not None


def use_decimal_comma(columns: list[Column]) -> list[str]:
    """Names of the columns with decimal commas, whose texts get points instead; none where another has points."""
    found = []
    for column in columns:
        if not column.is_list and any("," in text for text in column.texts):
            matching = sum(bool(_DECIMAL_COMMA.fullmatch(text.strip())) for text in column.texts)
            if matching >= 0.999 * len(column.texts):
                found.append(column)
        elif not column.is_list and any(_DECIMAL_POINT.fullmatch(text.strip()) for text in column.texts[:1000]):
            return []
    for column in found:
        column.set_texts([text.replace(",", ".") for text in column.texts])
    return [column.name for column in found]
