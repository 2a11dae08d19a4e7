"""Numbers whose texts have a decimal comma, as texts with a decimal point."""

import dataclasses

import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.values.columns import Bad

_NO_NUMBER = "?"


def with_points(array: pa.Array, decimal: str, null_values: tuple[str, ...]) -> pa.Array:
    """Texts of numbers for the readers of numbers; what means missing stays, and what are no texts too.

    Where commas are decimal, a text with a point is no number: 1.234 would be a thousand in one log, one in another.
    """
    if pa.types.is_dictionary(array.type):
        indices, texts = array.indices, with_points(array.dictionary, decimal, null_values)
        return texts.take(indices)
    if decimal == "." or not pa.types.is_string(array.type):
        return array
    numbers = pc.if_else(pc.match_substring(array, "."), _NO_NUMBER, pc.replace_substring(array, ",", "."))
    return pc.if_else(pc.is_in(array, value_set=pa.array(null_values, pa.string())), array, numbers)


def as_written(bad: list[Bad], array: pa.Array) -> list[Bad]:
    """The same bad rows with the texts that the log has."""
    out = []
    for item in bad:
        texts = pc.cast(array.take(pa.array(item.row_M)), pa.string())
        out.append(item if item.reason == "is missing" else dataclasses.replace(item, values=texts))
    return out
