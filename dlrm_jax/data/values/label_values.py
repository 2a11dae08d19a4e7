"""What a label's texts and a split's labels say of a schema: a positive text that is not there, a class that is not."""

import collections
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config import ConfigError
from dlrm_jax.data.schema.schema import Label

_SHOWN = 12


def shown_texts(texts: Mapping[str, int]) -> str:
    """Texts in quotes, so that spaces are seen, with how often they occur; the commonest first."""
    commonest = sorted(texts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    listed = ", ".join(f"{text[:60]!r} ({count:,})" for text, count in commonest)
    return listed + (f" and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else "")


def check_label(label: Label, texts_of_file: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The texts that counted as negative, of a label whose positive ones are named.

    ConfigError for a positive text that no row has, and for a file without a positive one that has texts which no file
    with a positive one has: there the label is written in another way.
    """
    wanted = {text.strip() for text in label.positive}
    texts: collections.Counter[str] = collections.Counter()
    for counts in texts_of_file.values():
        texts.update(counts)
    absent = sorted(wanted - texts.keys())
    if absent:
        raise ConfigError(
            f"label {label.column}: no row has the positive text {absent[0]!r}; its texts are {shown_texts(texts)}; "
            "name the positive ones among them in the schema"
        )
    known = {text for counts in texts_of_file.values() if wanted & counts.keys() for text in counts}
    for path, counts in texts_of_file.items():
        if counts and not wanted & counts.keys() and not counts.keys() <= known:
            raise ConfigError(
                f"{path}: no row of this file has a positive text of label {label.column} "
                f"({', '.join(map(repr, sorted(wanted)))}), but it has {shown_texts(counts)}; name all positive ones "
                "in the schema, or write the file as the others"
            )
    return {text: count for text, count in texts.most_common() if text not in wanted}


def one_class_warnings(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each split whose rows all have one label, by statistics of a prepared dataset."""
    lines = []
    for name, split in splits.items():
        only = only_label(split["rows"], split.get("positives"), split["positive_rate"])
        if only is not None:
            lines.append(describe_one_class(name, split["rows"], only))
    return lines


def only_label(rows: int, positives: int | None, rate: float | None) -> int | None:
    """The label that all rows have; None where there are both, or no rows. `rate` is rounded to six digits."""
    if positives is None and rate is not None and rows < 500_000:
        positives = round(rate * rows)
    return None if not rows or positives not in (0, rows) else int(positives == rows)


def describe_one_class(name: str, rows: int, only: int) -> str:
    """What a split of one class means."""
    effect = "there is nothing to learn" if name == "train" else "it has no AUC"
    return f"split {name}: all {rows:,} rows have label {only}, so {effect}; is the label right, and the split?"
