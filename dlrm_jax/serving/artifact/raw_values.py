"""One raw value as a number, a text, a whole number: what a request gives, which may be anything.

What cannot be used is Refused, in words. The rules are those of whole columns in data/values/, and a test holds them
together.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm_jax.data.schema.schema import Dense
from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.data.values import buckets, one_text, time_parts
from dlrm_jax.data.values.dense import LARGEST
from dlrm_jax.serving.artifact.errors import shown

_HEX = re.compile(r"[0-9a-fA-F]{1,16}")
MAX_TEXT = 1 << 16
"""Characters of one field: hashing takes half a microsecond for each."""

Column = Callable[[Any], Any]
"""What reads a column's values, one by one."""


class Refused(ValueError):
    """Why a value cannot be used; the caller knows row and field."""


def require_short(text: str) -> None:
    """Refused for a text beyond the limit."""
    if len(text) > MAX_TEXT:
        raise Refused(f"{shown(text)} has {len(text)} characters; at most {MAX_TEXT}")


def plain_number(value: Any) -> float:
    """A number of a model whose data has no schema."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{shown(value)} is not a number")
    number = _as_float(value)
    if not math.isfinite(number):
        raise Refused(f"{shown(value)} is not a finite number")
    return number


def is_among(texts: frozenset[str]) -> Callable[[str], bool]:
    """Whether a text is one of few; one that is longer is not, without being hashed, as a set would."""
    longest = max(map(len, texts), default=0)
    return lambda text: len(text) <= longest and text in texts


def dense_of(dense: Dense, nulls: frozenset[str]) -> Column:
    """A raw number, NaN where it is missing."""
    is_null = is_among(nulls)

    def read(value: Any) -> float:
        if isinstance(value, str):
            require_short(value)
        number = math.nan if value is None or (isinstance(value, str) and is_null(value)) else _number_of(value)
        if math.isinf(number) or (dense.needs_statistics and abs(number) > LARGEST):
            raise Refused(f"{shown(value)} is not a finite number")
        if math.isnan(number) and dense.missing == "error":
            raise Refused("is missing")
        return number

    return read


def with_points(read: Column, decimal: str, nulls: frozenset[str]) -> Column:
    """`read` for texts with decimal commas, as data/values/decimals.py has it; numbers are numbers."""
    is_null = is_among(nulls)

    def read_text(value: Any) -> Any:
        if isinstance(value, str) and not is_null(value):
            require_short(value)
            if "." in value:
                raise Refused(f"{shown(value)} has a point, and decimals of this log have a comma")
            value = value.replace(",", ".")
        return read(value)

    return read if decimal == "." else read_text


def _number_of(value: Any) -> float:
    """A number, as text or not; of a text also NaN, of both the infinities."""
    if isinstance(value, str):
        return number_of_text(value)
    if not isinstance(value, bool | int | float):
        raise Refused(f"{shown(value)} is not a number")
    if isinstance(value, float) and math.isnan(value):
        raise Refused("NaN is not a number; null stands for a missing value")
    return _as_float(value)


def _as_float(value: bool | int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def number_of_text(text: str) -> float:
    """What `one_text.number` reads."""
    found = one_text.number(text)
    if found is None:
        raise Refused(f"{shown(text)} is not a number")
    return found


def finite_number_of(value: Any) -> float:
    """A number, as text or not; -0 as 0."""
    number = _number_of(value)
    if not math.isfinite(number):
        raise Refused(f"{shown(value)} is not a finite number")
    return number + 0.0


def text_of(value: Any) -> str:
    """A value as preparation has it in a column of texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 2**53):
        return str(int(value))
    raise Refused(f"{shown(value)} is neither text nor a whole number; send the text as in the log")


def integer_of(value: Any) -> int:
    """A whole number of 64 bits."""
    if isinstance(value, str):
        number = one_text.integer(value)
    elif isinstance(value, int):
        number = int(value)
    else:
        number = int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else None
    if number is None or not -(2**63) <= number < 2**63:
        raise Refused(f"{shown(value)} is not a whole number of 64 bits")
    return number


def whole_number_of(sparse: Sparse) -> Callable[[Any], int]:
    """What makes the whole number of a value, for a column that is no string's and no quantile's: as
    data/values/derived.py, but that hex gives its 64 bits without a sign."""
    if sparse.buckets:
        return lambda value: _bucket_of(sparse.buckets, value)
    if sparse.part:
        return lambda value: _part_of(sparse, value)
    read = _hex_of if sparse.type == "hex" else integer_of
    return (lambda value: read(value) % sparse.modulo) if sparse.modulo else read


def _hex_of(value: Any) -> int:
    text = value.strip() if isinstance(value, str) else ""
    if not _HEX.fullmatch(text):
        raise Refused(f"{shown(value)} is not a hexadecimal number, as text")
    return int(text, 16)


def _bucket_of(rule: str, value: Any) -> int:
    integers, undefined = buckets.bucket(rule, np.array([finite_number_of(value)]))
    if undefined[0]:
        raise Refused(f"{shown(value)} has no whole number under {rule}")
    return int(integers[0])


def _part_of(sparse: Sparse, value: Any) -> int:
    moment: int | None
    if sparse.time_format in time_parts.UNITS:
        moments, beyond = time_parts.of_numbers(np.array([finite_number_of(value)]), sparse.time_format)
        moment = None if beyond[0] else int(moments[0])
    else:
        moment = time_parts.of_text(text_of(value), sparse.time_format)
    if moment is None:
        raise Refused(f"{shown(value)} is not {time_parts.describe(sparse.time_format)}")
    return int(time_parts.PARTS[sparse.part](np.array([moment]))[0])
