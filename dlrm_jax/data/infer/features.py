"""Guess what a column is as a feature: a number, a category, a list of them, or nothing to learn from."""

import re

import numpy as np

from dlrm_jax.data.infer.column import MANY, Column, numbers_of
from dlrm_jax.data.schema.schema import Dense, Sparse

_ID_WORDS = re.compile(
    "ids?|uid|key|code|hash|category|type|zip|ip|device|hour|day|weekday|month|uuid|guid|sku|asin|isbn|"
    "(user|item|movie|product|customer|ad|campaign|session|visitor|member|article|page|site|app|query|device|store|"
    "shop|order|account|book|song|artist|creative|advertiser|publisher|channel|category|brand|hotel|city|country)ids?"
)
_THINGS = re.compile(
    "customer|user|visitor|account|member|client|person|buyer|seller|merchant|vendor|author|session|item|product|movie|"
    "film|song|track|artist|book|article|document|doc|page|url|site|domain|host|ad|creative|campaign|advertiser|"
    "publisher|brand|store|shop|hotel|app|query|keyword|genre|tag|topic|city|country|region|state|county|language|"
    "locale|browser|os|platform|segment|cluster|group|cat|subcategory|department|channel|medium|referrer|order"
)
_COUNTED = re.compile("num|n|nr|no|number|counts?|cnt|total|sum|avg|mean")
_QUANTITIES = re.compile(
    _COUNTED.pattern + "|min|max|amount|price|cost|revenue|value|age|length|duration|size|score|rating|time|year|"
    "seconds|minutes|hours|days|weeks|months|views|clicks|impressions|visits|sales|salary|income|balance|distance|"
    "weight|height|width|quantity|qty|rate|ratio|percent|pct|temperature"
)
_SEPARATORS = ("|", ";", " ", ",")
_DISTINCT_SHARE = 0.95
"""A text or whole number that differs in more than this share of rows names the row, not a thing."""
_DISTINCT_THINGS_SHARE = 0.999
"""The same of numbers that are called user, item and the like: a sample may hold most of them once."""
_SPREAD_DISTINCT = 1000
"""Different numbers from which on an even spread says something."""
_LEAST_PEAKS = 10
"""Numbers that must be far more frequent than both their neighbours."""


def make_features(columns: list[Column], reasons: list[str]) -> tuple[list[Dense], list[Sparse]]:
    """What each column becomes, the reasons added."""
    dense: list[Dense] = []
    sparse: list[Sparse] = []
    for column in columns:
        feature, reason = _feature(column)
        reasons.append(f"{column.name}: {reason}")
        if isinstance(feature, Dense):
            dense.append(feature)
        elif feature is not None:
            sparse.append(feature)
    return dense, sparse


def _feature(column: Column) -> tuple[Dense | Sparse | None, str]:
    """(what the column becomes, why); None leaves it out."""
    name, many = column.name, len(column.texts) >= MANY
    if not column.texts or column.distinct < 2:
        return None, "left out, has no value or only one"
    if column.is_list:
        bags = [value for value in column.values if isinstance(value, list)]
        if _has_fractions([str(item) for bag in bags[:5000] for item in bag if item is not None]):
            return None, "left out, lists of numbers with a fraction: an embedding, no list of ids"
        lengths = [len(bag) for bag in bags]
        return _bag(name, "", lengths), f"sparse, lists of up to {max(lengths)} values"
    numbers = numbers_of(column)
    if numbers is not None:
        whole = bool((numbers == np.floor(numbers)).all())
        if not whole:
            spread = float(numbers.max()) > 100 * max(float(np.median(np.abs(numbers))), 1e-9) and numbers.min() >= 0
            return Dense(name, transform="log1p" if spread else "standardise", missing="mean"), (
                "dense, numbers with a fraction" + (", far spread: log1p" if spread else ", standardised")
            )
        return _whole_numbers(column, numbers, many)
    separator = _separator(column)
    if separator:
        parts = [text.split(separator) for text in column.texts]
        if _has_fractions([part for bag in parts[:5000] for part in bag]):
            return None, f"left out, lists at {separator!r} of numbers with a fraction: an embedding, no list of ids"
        lengths = [len(bag) for bag in parts]
        return _bag(name, separator, lengths), f"sparse, lists at {separator!r} of up to {max(lengths)} values"
    if not many or column.distinct_share < _DISTINCT_SHARE:
        return Sparse(name, oov=True), f"sparse, {column.distinct} texts"
    return None, f"left out, {column.distinct_share:.0%} of its texts differ: it names the row"


def _has_fractions(texts: list[str]) -> bool:
    """Whether texts are numbers, and many of them no whole ones."""
    fractions = 0
    for text in texts:
        try:
            number = float(text)
        except ValueError:
            return False
        fractions += number != np.floor(number)
    return fractions > 0.1 * len(texts)


def _whole_numbers(column: Column, numbers: np.ndarray, many: bool) -> tuple[Dense | Sparse | None, str]:
    name = column.name
    if _is_called_id(column.words):
        of_things = any(_THINGS.fullmatch(word) for word in column.words)
        most = _DISTINCT_THINGS_SHARE if of_things else _DISTINCT_SHARE
        if many and column.distinct_share > most:
            return None, f"left out, {column.distinct_share:.0%} of its numbers differ: it names the row"
        return Sparse(name, type="string", oov=True), f"sparse, whole numbers and a name like an id ({column.distinct})"
    if many and column.distinct_share > _DISTINCT_THINGS_SHARE:
        return None, "left out, every row has another whole number: it names the row"
    if column.distinct <= 32 and numbers.min() >= 0:
        return Sparse(name, type="string", oov=True), f"sparse, only {column.distinct} whole numbers"
    quantity = any(_QUANTITIES.fullmatch(word) for word in column.words)
    why = "" if quantity else _looks_like_ids(numbers)
    if why:
        return Sparse(name, type="string", oov=True), f"sparse, whole numbers like ids ({column.distinct}): {why}"
    if numbers.min() >= 0:
        return Dense(name, transform="log1p"), "dense, whole numbers from 0 on: counts, log1p"
    return Dense(name, transform="standardise", missing="mean"), "dense, whole numbers, standardised"


def _is_called_id(words: tuple[str, ...]) -> bool:
    """Whether a name says id: a word of ids, a thing as the last word, a thing's number. num_users are no ids."""
    if not words or _COUNTED.fullmatch(words[0]):
        return False
    first, last = words[:-1], words[-1]
    if any(_ID_WORDS.fullmatch(word) for word in words):
        return not _QUANTITIES.fullmatch(last)
    if last.isdigit() and first[-1:] == ("c",):  # C14 of a click log.
        return True
    if last in ("no", "nr", "num", "number"):
        return any(_THINGS.fullmatch(word) for word in first)
    return bool(_THINGS.fullmatch(last)) and not any(_QUANTITIES.fullmatch(word) for word in first)


def _looks_like_ids(numbers: np.ndarray) -> str:
    """Why whole numbers are rather ids than a quantity; empty if they are not.

    A quantity's frequencies rise and fall smoothly with its value, and crowd somewhere. Those of ids jump from one
    number to the next, since neighbours are strangers; or they fill a range of large numbers evenly.
    """
    values, counts = np.unique(numbers, return_counts=True)
    if numbers.min() < 0:
        return ""
    if len(values) >= _SPREAD_DISTINCT and values[0] >= 1000:
        place = (np.sort(numbers) - values[0]) / (values[-1] - values[0])
        if np.abs(place - np.linspace(0, 1, len(place))).max() < 0.05:
            return f"spread evenly from {values[0]:.0f} to {values[-1]:.0f}"
    left, here, right = counts[:-2], counts[1:-1], counts[2:]
    frequent = np.minimum(np.minimum(left, right), here) >= 5
    noise = 3 * np.sqrt(here + np.maximum(left, right))
    peak = (here - np.maximum(left, right) > noise) & (here >= 20)
    dip = (np.minimum(left, right) - here > noise) & frequent
    common = int((here >= 20).sum())
    peaks = values[1:-1][peak].astype(np.int64)
    if common and len(peaks) >= max(_LEAST_PEAKS, 0.15 * common) and (peak | dip).sum() >= 0.2 * common:
        rounded = np.bincount(peaks % 10, minlength=10)
        if rounded.max() + rounded[5] <= 0.5 * len(peaks):
            return "neighbouring numbers differ much in frequency"
    return ""


def _bag(name: str, separator: str, lengths: list[int]) -> Sparse:
    """Hotness covers 99 % of bags, and at most 64 ids."""
    hotness = int(min(max(np.quantile(lengths, 0.99, method="higher"), 1), 64))
    return Sparse(name, separator=separator, hotness=hotness, oov=True, pooling="mean")


def _separator(column: Column) -> str:
    """What cuts many texts into parts that recur: a list. Names have spaces and commas too, so there the parts must be
    far fewer than the texts."""
    sample = column.texts[:5000]
    for separator in _SEPARATORS:
        cut = [text.split(separator) for text in sample if separator in text]
        if len(cut) < 0.2 * len(sample):
            continue
        parts = [part for text in sample for part in text.split(separator)]
        distinct = len(set(parts))
        ambiguous = separator in " ," and distinct * 2 > len(set(sample))
        if distinct <= 0.2 * len(parts) and not ambiguous and all(len(part) <= 40 for part in parts):
            return separator
    return ""
