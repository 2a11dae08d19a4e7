"""Columns of a chunk -> numbers: the label, dense values, and bags of distinct keys.

Texts come as distinct values and an index (Arrow's dictionary arrays), so that each is parsed once a chunk.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.schema.schema import SPLITS, Dense, Label
from dlrm_jax.data.values import one_text, times
from dlrm_jax.data.values.dense import LARGEST, transform


@dataclasses.dataclass(frozen=True)
class Bad:
    """Rows whose value cannot be used, and why: `{value!r}` with `reason`."""

    row_M: np.ndarray
    column: str
    values: pa.Array
    """The value of each of those rows, as text."""
    reason: str


@dataclasses.dataclass
class Distinct:
    """Values of a column: `index_R` says which of `values` each row has, -1 for a missing one; no row has a null."""

    values: pa.Array
    index_R: np.ndarray

    @classmethod
    def of(cls, array: pa.Array, null_values: tuple[str, ...], keep_nulls: bool = False) -> "Distinct":
        """Distinct values of any array, by first appearance; a null, and a text among `null_values`, is missing.

        With `keep_nulls` a missing value is a value, null: the caller fills it in.
        """
        if pa.types.is_null(array.type):
            array = array.cast(pa.string())
        if pa.types.is_dictionary(array.type) and keep_nulls and array.indices.null_count:
            array = array.dictionary_decode()
        if not pa.types.is_dictionary(array.type):
            if pa.types.is_floating(array.type):
                array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
            encoded = _encode_words(array)
            if encoded is None:
                encoded = array.dictionary_encode(null_encoding="encode" if keep_nulls else "mask")
            array = encoded
        indices = array.indices.fill_null(-1) if array.indices.null_count else array.indices
        index = indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        values = array.dictionary
        if _is_text(values.type):
            missing = _is_among(values, null_values)
            if missing.any():
                if not keep_nulls:
                    index = np.where(_pad(missing, True)[index], np.int32(-1), index)
                values = pc.if_else(pa.array(missing), pa.scalar(None, values.type), values)
        return cls(values, index)

    @property
    def is_text(self) -> bool:
        """Whether the values are strings."""
        return _is_text(self.values.type)

    def spread(self, per_value: np.ndarray, missing: object) -> np.ndarray:
        """A number for each distinct value, as a number for each row."""
        return _pad(per_value, missing)[self.index_R]

    def bad(self, wrong_U: np.ndarray, column: str, reason: str) -> list[Bad]:
        """The rows whose value is wrong, as at most one Bad."""
        if not wrong_U.any():
            return []
        rows = np.flatnonzero(self.spread(wrong_U, False))
        texts = pc.cast(self.values.take(pa.array(self.index_R[rows])), pa.string())
        return [Bad(rows, column, texts, reason)] if len(rows) else []

    def missing(self, column: str) -> list[Bad]:
        """The rows without a value."""
        rows = np.flatnonzero(self.index_R < 0)
        return [Bad(rows, column, pa.array([""] * len(rows)), "is missing")] if len(rows) else []


def _encode_words(texts: pa.Array) -> pa.DictionaryArray | None:
    """`dictionary_encode` of texts of 8 bytes or none, as machine words: a third of its time. None for other arrays."""
    if not pa.types.is_string(texts.type) or texts.offset or texts.null_count or not len(texts):
        return None
    _, offset_buffer, data = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[: len(texts) + 1]
    full = np.diff(offsets) == 8
    num_full = np.count_nonzero(full)
    if data is None or offsets[-1] - offsets[0] != 8 * num_full:
        return None
    words = np.frombuffer(data, np.uint64, num_full, offset=offsets[0])
    some_empty = num_full < len(full)
    if some_empty:
        if not words.all():  # Eight zero bytes, which could not be told from an empty text.
            return None
        packed, words = words, np.zeros(len(full), np.uint64)
        words[full] = packed
    encoded = pa.array(words).dictionary_encode()
    distinct = encoded.dictionary.to_numpy()
    lengths = np.where(distinct == 0, 0, 8) if some_empty else np.full(len(distinct), 8)
    ends = np.append(0, np.cumsum(lengths)).astype(np.int32)
    data = distinct[lengths > 0].tobytes()
    values = pa.StringArray.from_buffers(len(distinct), pa.py_buffer(ends), pa.py_buffer(data))
    return pa.DictionaryArray.from_arrays(encoded.indices, values)


def _is_among(texts: pa.Array, null_values: tuple[str, ...]) -> np.ndarray:
    # Most columns have no text of a null value's length: that is seen from the offsets alone.
    lengths = pc.binary_length(texts).fill_null(-1).to_numpy(zero_copy_only=False)
    if not any((lengths == length).any() for length in {len(text.encode()) for text in null_values}):
        return np.zeros(len(texts), bool)
    nulls = pa.array(null_values, texts.type)
    return pc.is_in(texts, value_set=nulls, skip_nulls=True).to_numpy(zero_copy_only=False)


def _pad(values: np.ndarray, last: object) -> np.ndarray:
    """`values` and one more, which index -1 means."""
    return np.append(values, np.asarray(last, values.dtype))


def to_numbers(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(float64 of each, 0 where it is none; whether it is none). NaN is a number, null too; infinities are not.

    Text is what Python's `float` reads, but for `_`. Moments count as microseconds since 1970.
    """
    kind, nulls = values.type, values.is_null().to_numpy(zero_copy_only=False)
    if _is_text(kind):
        numbers = _cast_texts(values)
        if numbers is None:
            found = [None if text is None else one_text.number(text) for text in values.to_pylist()]
            numbers = pa.array(found, pa.float64())
    elif pa.types.is_boolean(kind):
        numbers = pc.cast(pc.cast(values, pa.int8()), pa.float64())
    elif times.is_temporal(kind):
        numbers = pa.array(times.of_temporal(values).astype(np.float64), mask=nulls)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = pc.cast(values, pa.float64(), safe=False)
    else:
        numbers = pa.nulls(len(values), pa.float64())
    wrong = numbers.is_null().to_numpy(zero_copy_only=False) & ~nulls
    out = _filled(numbers)
    infinite = np.isinf(out)
    return np.where(infinite, 0.0, out), wrong | infinite


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _cast_texts(texts: pa.Array) -> pa.Array | None:
    """float64 of texts that Arrow reads; None if there is one that it refuses, or reads and `float` does not."""
    try:
        numbers = pc.cast(texts, pa.float64())
    except pa.ArrowInvalid:
        return None
    not_numbers = pc.filter(texts, pc.is_nan(numbers))
    return None if pc.any(pc.match_substring(not_numbers, "(")).as_py() else numbers  # As nan(1).


def to_integers(values: pa.Array, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(int64 of each, 0 where it is none; whether it is none); `kind` is int or hex. 64 bits of hex fill the sign.

    Text of type int is `one_text.integer` of it, of type hex at most 16 digits.
    """
    if pa.types.is_integer(values.type):
        return _filled(values.cast(pa.int64(), safe=False)), np.zeros(len(values), bool)
    if not _is_text(values.type):
        numbers, wrong = to_numbers(values)
        wrong = wrong | (numbers != np.floor(numbers)) | (np.abs(numbers) > 2**53)
        return np.where(wrong, 0, numbers).astype(np.int64), wrong
    if kind == "hex" and (fixed := _parse_fixed_hex(values)) is not None:
        return fixed, np.zeros(len(values), bool)
    text = pc.utf8_trim_whitespace(values)
    found = _cast_hex(text) if kind == "hex" else _cast_decimal(text)
    if found is not None:
        return found, np.zeros(len(text), bool)
    if kind == "int":
        integers = [0 if value is None else one_text.integer(value) for value in text.to_pylist()]
        wrong = np.asarray([value is None for value in integers])
        return np.asarray([value or 0 for value in integers], np.int64), wrong
    wrong = ~pc.match_substring_regex(text, "^[0-9a-fA-F]{1,16}$").fill_null(True).to_numpy(zero_copy_only=False)
    found = _cast_hex(pc.if_else(pa.array(wrong), "0", text))
    assert found is not None
    return found, wrong


def _cast_hex(text: pa.Array) -> np.ndarray | None:
    """int64 of hexadecimal texts without a prefix, nulls as 0; None if any is none."""
    try:
        return _filled(pc.cast(pc.binary_join_element_wise("0x", text, ""), pa.uint64())).view(np.int64)
    except pa.ArrowInvalid:
        return None


def _cast_decimal(text: pa.Array) -> np.ndarray | None:
    """int64 of decimal texts, nulls as 0; None if any is none, or has a plus, or is one of Arrow's 0x1f."""
    try:
        found = _filled(pc.cast(text, pa.int64()))
    except pa.ArrowInvalid:
        return None
    return None if pc.any(pc.match_substring(text, "x", ignore_case=True)).as_py() else found


_HEX = np.full(256, 255, np.uint8)
_HEX[[*b"0123456789"]] = np.arange(10)
_HEX[[*b"abcdef"]] = _HEX[[*b"ABCDEF"]] = np.arange(10, 16)


def _parse_fixed_hex(texts: pa.Array) -> np.ndarray | None:
    """int64 of hexadecimal texts that all have one length, nulls as 0; None for others. Five times Arrow's cast."""
    if not pa.types.is_string(texts.type) or texts.offset or not len(texts):
        return None
    valid, offset_buffer, data = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[: len(texts) + 1]
    lengths = np.diff(offsets)
    length = int(lengths.max())
    present = lengths == length
    if not 0 < length <= 16 or data is None:
        return None
    if not present.all() and (valid is None or (lengths[~present] > 0).any() or texts.null_count != (~present).sum()):
        return None
    digits_UxL = _HEX[np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]].reshape(-1, length)]
    if digits_UxL.max() > 15:
        return None
    numbers = np.zeros(len(digits_UxL), np.uint64)
    for column in digits_UxL.T:
        numbers = (numbers << np.uint64(4)) | column
    out = np.zeros(len(texts), np.int64)
    out[present] = numbers.view(np.int64)
    return out


def _filled(values: pa.Array) -> np.ndarray:
    return values.fill_null(0).to_numpy(zero_copy_only=False)


def label_texts(array: pa.Array, null_values: tuple[str, ...]) -> Distinct:
    """The distinct texts of a label that names its positive ones, without the spaces around them."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    texts = pc.cast(array, pa.string())
    return Distinct.of(pc.utf8_trim_whitespace(texts), null_values)


def read_label(label: Label, array: pa.Array, null_values: tuple[str, ...]) -> tuple[np.ndarray, list[Bad]]:
    """(label_R as float32, bad rows)."""
    if label.positive:
        distinct = label_texts(array, null_values)
        wanted = pa.array([text.strip() for text in label.positive])
        positive = pc.is_in(distinct.values, value_set=wanted).to_numpy(zero_copy_only=False)
        return distinct.spread(positive.astype(np.float32), 0), distinct.missing(label.column)
    distinct = Distinct.of(array, null_values)
    bad = distinct.missing(label.column)
    numbers, wrong = to_numbers(distinct.values)
    if distinct.is_text and wrong.any():
        numbers, wrong = _with_booleans(distinct.values, numbers, wrong)
    wrong = wrong | np.isnan(numbers)
    bad += distinct.bad(wrong, label.column, "is not a number")
    if label.threshold is not None:
        return distinct.spread((numbers >= label.threshold).astype(np.float32), 0), bad
    binary = (numbers == 0) | (numbers == 1)
    bad += distinct.bad(~wrong & ~binary, label.column, "is neither 0 nor 1")
    return distinct.spread(np.where(binary, numbers, 0).astype(np.float32), 0), bad


def _with_booleans(texts: pa.Array, numbers: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`to_numbers` with true as 1 and false as 0, as JSON writes them."""
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    value = pc.index_in(lower, value_set=pa.array(["false", "true"])).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where(value >= 0, value.astype(np.float64), numbers), wrong & (value < 0)


def read_number(column: str, array: pa.Array, null_values: tuple[str, ...]) -> tuple[np.ndarray, list[Bad]]:
    """(float64 of each row, NaN where it is missing; bad rows)."""
    distinct = Distinct.of(array, null_values)
    numbers, wrong = to_numbers(distinct.values)
    return distinct.spread(numbers, np.nan), distinct.bad(wrong, column, "is not a finite number")


def read_time(
    column: str, array: pa.Array, null_values: tuple[str, ...]
) -> tuple[tuple[np.ndarray, np.ndarray], list[Bad]]:
    """((int64 of each row, whether it was a date), bad rows): numbers as they stand, dates as microseconds since 1970.

    What is a date is said in times.py.
    """
    distinct = Distinct.of(array, null_values)
    moments, wrong, dates = to_times(distinct.values)
    bad = distinct.missing(column) + distinct.bad(wrong, column, "is neither a number nor a date (ISO 8601)")
    return (distinct.spread(moments, 0), distinct.spread(dates, False)), bad


def to_times(values: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int64 of each, 0 where it is none; whether it is none; whether it is a date instead of a number)."""
    if times.is_temporal(values.type):
        moments, wrong, dates = times.of_temporal(values), np.zeros(len(values), bool), np.ones(len(values), bool)
    elif _is_text(values.type) and (common := times.of_common_texts(values)) is not None:
        return common, np.zeros(len(values), bool), np.ones(len(values), bool)
    else:
        numbers, wrong = to_numbers(values)
        wrong = wrong | np.isnan(numbers) | (np.abs(numbers) >= one_text.BEYOND)
        moments, dates = np.where(wrong, 0, numbers).astype(np.int64), np.zeros(len(values), bool)
        for i in np.flatnonzero(wrong) if _is_text(values.type) else ():
            moment = one_text.moment(values[i].as_py())
            if moment is not None:
                moments[i], dates[i], wrong[i] = moment, True, False
    wrong = wrong | (np.abs(moments) >= one_text.BEYOND)
    return np.where(wrong, 0, moments), wrong, dates


def read_split(column: str, array: pa.Array, null_values: tuple[str, ...]) -> tuple[np.ndarray, list[Bad]]:
    """(uint8 of each row: 0 train, 1 val, 2 test; bad rows)."""
    distinct = Distinct.of(array, null_values)
    position = pc.index_in(pc.cast(distinct.values, pa.string()), value_set=pa.array(SPLITS))
    wrong = position.is_null().to_numpy(zero_copy_only=False)
    codes = position.fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint8)
    bad = distinct.missing(column) + distinct.bad(wrong, column, f"is none of {', '.join(SPLITS)}")
    return distinct.spread(codes, 0), bad


def read_dense(dense: Dense, array: pa.Array, null_values: tuple[str, ...]) -> tuple[np.ndarray, list[Bad]]:
    """(values of each row, bad rows): transformed float32, or the raw float64 (NaN: missing) if statistics decide."""
    distinct = Distinct.of(array, null_values)
    numbers, wrong = to_numbers(distinct.values)
    bad = distinct.bad(wrong, dense.source, "is not a finite number")
    if dense.missing == "error":
        bad += distinct.missing(dense.source)
        bad += distinct.bad(np.isnan(numbers), dense.source, "is not a number")
    if dense.needs_statistics:
        bad += distinct.bad(np.abs(numbers) > LARGEST, dense.source, f"is beyond {LARGEST:g}")
        fill = np.nan if dense.missing == "mean" else dense.fill
        return distinct.spread(np.where(np.isnan(numbers), fill, numbers), fill), bad
    values = transform(dense.transform, _pad(np.where(np.isnan(numbers), dense.fill, numbers), dense.fill))
    undefined = ~np.isfinite(values)
    bad += distinct.bad(undefined[:-1] & ~wrong, dense.source, f"has no finite float32 under {dense.transform}")
    return values[distinct.index_R], bad


def is_missing(array: pa.Array, null_values: tuple[str, ...]) -> np.ndarray:
    """Of each row, whether it has no value: null, a text among `null_values`, NaN."""
    if pa.types.is_dictionary(array.type):
        indices = array.indices.fill_null(len(array.dictionary)).to_numpy(zero_copy_only=False)
        return _pad(is_missing(array.dictionary, null_values), True)[indices]
    missing = array.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        missing = missing | _is_among(array, null_values)
    return missing
