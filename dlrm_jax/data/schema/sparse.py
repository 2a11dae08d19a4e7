"""Sparse: a categorical column of a schema, how its values are read or made, and how they get ids."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlrm_jax.config import require, require_choice
from dlrm_jax.config.model import POOLINGS
from dlrm_jax.data.values import buckets, one_text, time_parts
from dlrm_jax.data.values.buckets import QUANTILE

TYPES = ("string", "int", "hex")
ID_RULES = ("vocabulary", "hash", "raw")
ORDERS = ("first", "frequency", "value")
SPARSE_MISSING = ("empty", "fill", "error")


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A categorical value, or a list of them.

    `type` says how text is read: string, int, or hex (both whole numbers, so that 00ff is ff). `ids`:
    vocabulary, a table row for each distinct value, by first appearance, by frequency, or by value (numbers by size,
    texts by code points); hash, hash64(value) mod `size`, see hashing.py; raw, the number itself, which must be less
    than `size` (0: the greatest one + 1).
    `modulo` takes whole numbers modulo itself first, as the reference's --max-ind-range.
    Values that occur less than `min_count` times, and at serving unknown ones, share id 0 if `oov`, else they are
    left out of the bag. A missing value is an empty bag, or the value `fill`, or an error.
    Lists: text is cut at `separator`; a bag keeps its first `hotness` ids, the rest is counted as truncated.
    Features that name one `table` share its rows and its vocabulary.

    A value may be made, instead of read as it stands; then `type` is left out, and `fill` is as the log would have it:
    `buckets`, of a number, a whole number by a rule of values/buckets.py. log_squared: floor(log(x)^2), Criteo's;
    quantile: one of `size` buckets of about as many training rows each, which is the id; or a rule of one's own.
    `part`, of a time, its hour, weekday (0 is Sunday) or weekend (1, else 0); `time_format` says how the time is
    written (values/time_parts.py).
    `cross`, of other sparse columns of the schema, their values as one text, missing where one of them is.
    """

    name: str
    column: str = ""
    type: str = "string"
    ids: str = "vocabulary"
    size: int = 0
    modulo: int = 0
    min_count: int = 1
    order: str = "first"
    oov: bool = False
    missing: str = "empty"
    fill: str = ""
    separator: str = ""
    hotness: int = 1
    pooling: str = "sum"
    table: str = ""
    buckets: str = ""
    part: str = ""
    time_format: str = ""
    cross: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"sparse column {self.name!r}"
        if self.buckets == QUANTILE and self.ids == "vocabulary":
            object.__setattr__(self, "ids", "raw")  # A bucket's number is its id.
        for field, choices in (
            ("type", TYPES),
            ("ids", ID_RULES),
            ("order", ORDERS),
            ("missing", SPARSE_MISSING),
            ("pooling", POOLINGS),
        ):
            require_choice(f"{where}: {field}", getattr(self, field), choices)
        for field, least in (("size", 0), ("modulo", 0), ("min_count", 1), ("hotness", 1)):
            require(getattr(self, field) >= least, f"{where}: {field} is {getattr(self, field)}; at least {least}")
        require(self.size < 2**31, f"{where}: size is {self.size}; ids are int32, so at most {2**31 - 1}")
        require(self.ids != "hash" or self.size > 0, f"{where}: ids: hash needs size, the number of buckets")
        self._check_made(where)
        require(self.ids != "raw" or self.value_type != "string", f"{where}: ids: raw needs type: int or hex")
        require(self.modulo == 0 or self.type != "string", f"{where}: modulo needs type: int or hex")
        require(self.modulo < 2**31, f"{where}: modulo is {self.modulo}; at most {2**31 - 1}")
        vocabulary = self.ids == "vocabulary"
        require(vocabulary or self.min_count == 1, f"{where}: min_count needs ids: vocabulary")
        require(vocabulary or not self.oov, f"{where}: oov needs ids: vocabulary")
        require(vocabulary or self.order == "first", f"{where}: order needs ids: vocabulary")
        require(not vocabulary or self.size == 0, f"{where}: the data decides the size of a vocabulary; leave size out")
        require(self.missing == "fill" or not self.fill, f"{where}: fill needs missing: fill")
        require(self.missing != "fill" or self._fill_fits(), f"{where}: fill {self.fill!r} is not {self._wanted()}")

    def _check_made(self, where: str) -> None:
        """Of a value that is made of others, in one line."""
        made = [name for name in ("buckets", "part", "cross") if getattr(self, name)]
        require(len(made) <= 1, f"{where}: it has {' and '.join(made)}; a value is made in one of these ways")
        require(not made or self.type == "string", f"{where}: {''.join(made)} says what is read; leave type out")
        if self.buckets:
            require_choice(f"{where}: buckets", self.buckets, buckets.names())
        if self.buckets == QUANTILE:
            require(self.ids == "raw", f"{where}: buckets: quantile gives the ids; leave ids: {self.ids} out")
            require(self.size >= 2, f"{where}: buckets: quantile needs size, the number of buckets, at least 2")
        if self.part:
            require_choice(f"{where}: part", self.part, tuple(time_parts.PARTS))
        require(bool(self.part) or not self.time_format, f"{where}: time_format is for a part of a time; say part")
        time_parts.require_format(where, self.time_format)
        if self.cross:
            several = len(set(self.cross)) == len(self.cross) >= 2
            require(several, f"{where}: cross is {', '.join(self.cross)}; it needs two sparse columns or more")
            of_lists = self.column or self.separator or self.hotness > 1
            require(not of_lists, f"{where}: cross makes one value of others; leave column, separator and hotness out")

    def _fill_fits(self) -> bool:
        if self.buckets or self.time_format in time_parts.UNITS:
            number = one_text.number(self.fill)
            if number is None or not math.isfinite(number):
                return False
            return not self.buckets or self.is_quantile or not buckets.bucket(self.buckets, np.array([number]))[1][0]
        if self.part:
            return time_parts.of_text(self.fill, self.time_format) is not None
        if self.type == "hex":
            return re.fullmatch("[0-9a-fA-F]{1,16}", self.fill) is not None
        return self.type == "string" or one_text.integer(self.fill) is not None

    def _wanted(self) -> str:
        if self.buckets:
            return f"a finite number that has a bucket under {self.buckets}"
        return time_parts.describe(self.time_format) if self.part else f"of type {self.type}"

    @property
    def value_type(self) -> str:
        """The type of its values: of TYPES, or number."""
        if self.buckets == QUANTILE:
            return "number"
        return "int" if self.buckets or self.part else self.type

    @property
    def is_quantile(self) -> bool:
        """Whether its ids wait for the edges of buckets, which the whole log decides."""
        return self.buckets == QUANTILE

    @property
    def source(self) -> str:
        """The column of the log; of a cross, which has none, its name."""
        return self.column or self.name

    @property
    def table_name(self) -> str:
        """The table whose rows its ids name."""
        return self.table or self.name

    def rule(self) -> tuple[Any, ...]:
        """What features of one table must agree on."""
        made = (self.buckets, self.part)
        return (self.value_type, self.ids, self.size, self.modulo, self.min_count, self.order, self.oov, *made)


def check_crosses(columns: Sequence[Sparse]) -> None:
    """ConfigError for a cross of what is no column of the schema, or of one that has no single value by itself."""
    known = {column.name: column for column in columns}
    for column in columns:
        for name in column.cross:
            where = f"sparse column {column.name!r}: cross: {name}"
            require(name in known, f"{where} is not a sparse column of this schema; add one of this name")
            part = known[name]
            require(not part.cross, f"{where} is a cross itself; name the columns that it crosses")
            require(not part.is_quantile, f"{where} has quantile buckets, which are known only after the whole log")
            require(part.hotness == 1 and not part.separator, f"{where} is a list; a cross is of single values")
