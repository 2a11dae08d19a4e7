"""Which Arrow types a column may have for what it is used: what no reader takes is refused by name, before any row."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.config import ConfigError

_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
_VALUE = (
    *_TEXT,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_null,
)
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return any(test(kind) for test in _LISTS)


def why_unusable(kind: pa.DataType, role: str) -> str:
    """Why a column of this type cannot be a sparse one, or one of another role; empty where it can."""
    if pa.types.is_dictionary(kind):
        return why_unusable(kind.value_type, role)
    if is_list(kind):
        if role != "sparse":
            return "lists, where one value a row belongs"
        inner = kind.value_type.value_type if pa.types.is_dictionary(kind.value_type) else kind.value_type
        return "" if any(test(inner) for test in (*_VALUE, *_BYTES)) else f"lists of {_words(inner)}, not of values"
    if any(test(kind) for test in (*_VALUE, *_BYTES)) or (pa.types.is_time(kind) and role == "sparse"):
        return ""
    return f"{_words(kind)}, not {'values' if role == 'sparse' else 'numbers'}"


def _words(kind: pa.DataType) -> str:
    for test, words in (
        (pa.types.is_struct, "structs"),
        (pa.types.is_map, "maps"),
        (is_list, "lists"),
        (pa.types.is_duration, "durations"),
        (pa.types.is_time, "times of day"),
    ):
        if test(kind):
            return words
    return f"values of type {str(kind)[:60]}"


def require_usable(path: str, kinds: Mapping[str, pa.DataType], roles: Mapping[str, list[str]]) -> None:
    """ConfigError naming the first column that cannot be used for what the schema says."""
    for name, named in roles.items():
        for role in named:
            reason = why_unusable(kinds[name], role)
            if reason:
                raise ConfigError(f"{path}, column {name}: holds {reason}; as {role} it cannot be used")


def plain(array: pa.Array) -> pa.Array:
    """An array of the few types that readers know: without dictionary, and bytes as texts, whether UTF-8 or not.

    The order of a dictionary's values says nothing of their first appearance.
    """
    if pa.types.is_dictionary(array.type):
        return plain(array.dictionary_decode())
    kind = _plain_type(array.type)
    if kind == array.type:
        return array
    # A strict cast would refuse the chunk for one row that is no UTF-8.
    return pc.cast(array, options=pc.CastOptions(kind, allow_invalid_utf8=True))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if any(test(kind) for test in (*_TEXT, *_BYTES, pa.types.is_time)):
        return pa.string()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    return pa.float32() if pa.types.is_float16(kind) else kind
