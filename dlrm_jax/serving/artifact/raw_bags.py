"""Raw values to the ids of a feature's bag: a value, a list of them, or of a cross the values of several columns."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.data.values import buckets, one_text
from dlrm_jax.data.values.hashing import hash_integer, hash_text
from dlrm_jax.data.values.vocabulary import Vocabulary
from dlrm_jax.serving.artifact.errors import shown
from dlrm_jax.serving.artifact.raw_values import (
    Column,
    Refused,
    finite_number_of,
    is_among,
    require_short,
    text_of,
    whole_number_of,
    with_points,
)
from dlrm_jax.serving.artifact.signature import Signature

_REMEMBERED = 1 << 16
"""Values of a feature whose ids are kept at hand,"""
_SHORT = 64
"""of so many characters at most, so that what is kept is bounded in bytes."""
_MASK = (1 << 64) - 1

UNKNOWN = -2
"""An id that says: a value that the training log did not have."""


@dataclasses.dataclass(frozen=True)
class BagReader:
    """How a feature's bag comes of a row: `columns` of it by name, each with what reads it.

    What is read is the bag, of one column; of several `combine` makes it. `when_unknown` is the id of unknown values.
    """

    columns: tuple[tuple[str, Column], ...]
    when_unknown: int = EMPTY_SLOT
    combine: Callable[[Sequence[str | None]], list[int]] | None = None


def plain_bag(name: str, rows: int, hotness: int) -> BagReader:
    """Of a model whose data has no schema: ids."""

    def one(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Refused(f"{shown(value)} is not an id (a whole number)")
        if not 0 <= value < rows:
            raise Refused(f"id {shown(value)} is outside its table of {rows} rows (ids 0 to {rows - 1})")
        return value

    def read(value: Any) -> list[int]:
        if value is None:
            return []
        if not isinstance(value, list):
            return [one(value)]
        if len(value) > hotness:
            raise Refused(f"{len(value)} ids in one bag, but its hotness is {hotness}")
        return [one(item) for item in value]

    return BagReader(((name, read),))


def bag_readers(
    schema: Schema, signature: Signature, vocabularies: Mapping[str, Vocabulary], max_bag: int
) -> list[BagReader]:
    """Of each sparse column of a schema. A bag of more than `max_bag` values is refused."""
    nulls, by_name = frozenset(schema.null_values), {sparse.name: sparse for sparse in schema.sparse}
    rows = {feature.table: feature.rows for feature in signature.features}
    out = []
    for sparse in schema.sparse:
        table = sparse.table_name
        edges, longest = (signature.bucket_edges or {}).get(table, ()), (signature.longest or {}).get(table)
        id_of = _remembering(_id_of(sparse, vocabularies.get(table), edges, rows[table], longest))
        when_unknown = 0 if sparse.oov else EMPTY_SLOT
        fill = [id_of(sparse.fill)] if sparse.missing == "fill" else []
        if sparse.cross:
            parts = [by_name[name] for name in sparse.cross]
            columns = [
                (part.source, _decimal(part, schema, nulls, _text_in_cross(part, nulls, max_bag))) for part in parts
            ]
            out.append(BagReader(tuple(columns), when_unknown, _crossed(sparse, id_of, fill)))
        else:
            read = _decimal(sparse, schema, nulls, _bag_of(sparse, nulls, id_of, fill, max_bag))
            out.append(BagReader(((sparse.source, read),), when_unknown))
    return out


def _decimal(sparse: Sparse, schema: Schema, nulls: frozenset[str], read: Column) -> Column:
    return with_points(read, schema.decimal, nulls) if sparse.buckets else read


def _bag_of(
    sparse: Sparse, nulls: frozenset[str], id_of: Callable[[Any], int], fill: list[int], max_bag: int
) -> Column:
    """A value to the ids of its bag. Of a longer one only the first `hotness` values are looked at."""
    values_of = _values_of(sparse, nulls, max_bag)

    def read(value: Any) -> list[int]:
        bag = [id_of(item) for item in values_of(value)]
        if not bag and sparse.missing == "error":
            raise Refused("is missing")
        return bag or fill

    return read


def _values_of(sparse: Sparse, nulls: frozenset[str], max_bag: int) -> Callable[[Any], list[Any]]:
    """A value to what is in its bag, without what is missing."""
    is_null = is_among(nulls)

    def present(value: Any) -> bool:
        return value is not None and not (isinstance(value, str) and is_null(value))

    def read(value: Any) -> list[Any]:
        if isinstance(value, str):
            require_short(value)
            if sparse.separator and present(value):
                _require_small(value.count(sparse.separator) + 1, max_bag)
                value = value.split(sparse.separator)
        if not isinstance(value, list):
            return [value] if present(value) else []
        _require_small(len(value), max_bag)
        # Preparation has a list's values in one column of texts, and cuts bags before it looks at them.
        first = list(itertools.islice(filter(present, value), sparse.hotness))
        require_short("".join(item for item in first if isinstance(item, str)))
        return first

    return read


def _require_small(count: int, max_bag: int) -> None:
    if count > max_bag:
        raise Refused(f"{count} values in one bag; at most {max_bag}")


def _text_in_cross(part: Sparse, nulls: frozenset[str], max_bag: int) -> Column:
    """A value to the text that it is in a cross; None where it is missing."""
    values_of = _values_of(part, nulls, max_bag)
    whole_of = None if part.value_type == "string" else whole_number_of(part)

    def read(value: Any) -> str | None:
        values = values_of(value) or ([part.fill] if part.missing == "fill" else [])
        if not values:
            return None
        return text_of(values[0]) if whole_of is None else str(whole_of(values[0]))

    return read


def _crossed(
    sparse: Sparse, id_of: Callable[[Any], int], fill: list[int]
) -> Callable[[Sequence[str | None]], list[int]]:
    def combine(texts: Sequence[str | None]) -> list[int]:
        there = [text for text in texts if text is not None]
        if len(there) == len(texts):
            return [id_of(one_text.joined(there))]
        if sparse.missing == "error":
            raise Refused("is missing")
        return fill

    return combine


def _remembering(id_of: Callable[[Any], int]) -> Callable[[Any], int]:
    known: dict[str, int] = {}

    def remembered(value: Any) -> int:
        # 1, 1.0 and True are one key of a dict, but not one value; and a dict hashes what it is asked for.
        if not isinstance(value, str) or len(value) > _SHORT:
            return id_of(value)
        found = known.get(value)
        if found is None:
            found = id_of(value)
            if len(known) < _REMEMBERED:
                known[value] = found
        return found

    return remembered


def _id_of(
    sparse: Sparse, vocabulary: Vocabulary | None, edges: Sequence[float], rows: int, longest: int | None
) -> Callable[[Any], int]:
    """One value to its id, or UNKNOWN: where a text is longer than the vocabulary's `longest`, without hashing it."""
    if sparse.is_quantile:
        return lambda value: int(buckets.among(edges, np.array([finite_number_of(value)]))[0])
    is_text = sparse.value_type == "string"
    whole_of = None if is_text else whole_number_of(sparse)

    def find(value: Any) -> int:
        text = _bytes_of(value) if whole_of is None else b""
        if longest is not None and len(text) > longest:
            return UNKNOWN
        key = hash_text(text) if whole_of is None else whole_of(value)
        if sparse.ids == "hash":
            return (key if is_text else hash_integer(key)) % sparse.size
        if sparse.ids == "raw":
            if not 0 <= key < rows:
                raise Refused(f"{shown(value)} is outside the table's ids 0 to {rows - 1}")
            return key
        assert vocabulary is not None
        found = vocabulary.find_one(key & _MASK, (lambda: hash_text(text, seed=1)) if is_text else None)
        return found + int(sparse.oov) if found >= 0 else UNKNOWN

    return find


def _bytes_of(value: Any) -> bytes:
    try:
        return text_of(value).encode()
    except UnicodeEncodeError:
        raise Refused(f"{shown(value)} is not valid Unicode") from None
