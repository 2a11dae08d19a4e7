"""Ids for the keys of a chunk that are new, in the log's order, and what is then ready to be staged."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.data.formats.source import BadRow, Chunk, Position
from dlrm_jax.data.prepare.staging import Additions, Staging
from dlrm_jax.data.values.bags import Bags
from dlrm_jax.data.values.vocabulary import Vocabulary

MAX_EXAMPLES = 20
"""Bad rows that one staged file describes in full; the others are counted."""
MAX_LABEL_TEXTS = 1000
"""Texts of a label that one staged file counts by themselves; a label of more is no label."""
OTHER_TEXTS = "(others)"

IS_DATE = "time_is_date"
"""Column of a chunk, not staged: whether a row's time is a date, and not a number."""


@dataclasses.dataclass
class Parsed:
    """A chunk as numbers, but for the ids of vocabularies."""

    chunk: Chunk
    columns: dict[str, np.ndarray]
    bags: list[Bags]
    num_rows: int
    num_kept: int
    bad: list[BadRow]
    label_texts: dict[str, int] = dataclasses.field(default_factory=dict)
    """How often each text of the label occurs, where the schema names the positive ones."""
    names: frozenset[str] | None = None
    """Names of columns that some row has, where each row names its own."""
    first_rows: list[list[Any]] = dataclasses.field(default_factory=list)
    """See first_rows.py."""


def _join(parts: list[Additions]) -> Additions:
    checks = None if parts[0].checks is None else np.concatenate([part.checks for part in parts])
    texts = None if parts[0].texts is None else pa.concat_arrays([part.texts for part in parts])
    return Additions(parts[0].table, np.concatenate([part.keys for part in parts]), checks, texts)


def number_new(vocabulary: Vocabulary, bags: list[Bags]) -> Additions | None:
    """Give ids to the keys without one; the new ones. Features that share a vocabulary are numbered row by row."""
    ids = np.concatenate([bag.ids_U for bag in bags])
    # Keys that no row uses (texts of a missing value, or of rows left out) get no id.
    unknown = np.flatnonzero((ids < 0) & np.concatenate([_used(bag) for bag in bags]))
    if not len(unknown):
        return None
    if len(bags) > 1 or not bags[0].ordered:
        unknown = unknown[np.argsort(np.concatenate(_first_places(bags))[unknown], kind="stable")]
    keys = np.concatenate([bag.keys_U for bag in bags])[unknown]
    checked = bags[0].checks_U is not None
    checks = np.concatenate([bag.checks_U for bag in bags])[unknown] if checked else None
    ids[unknown], new = vocabulary.encode(keys, checks)
    start = 0
    for bag in bags:
        bag.ids_U = ids[start : start + len(bag.keys_U)]
        start += len(bag.keys_U)
    if not len(new):
        return None
    texts = pa.concat_arrays([bag.texts_U for bag in bags]).take(pa.array(unknown[new])) if checked else None
    return Additions(0, keys[new], checks[new] if checks is not None else None, texts)


def ids_matrix(bags: list[Bags]) -> np.ndarray:
    """ids_RxK of bags whose ids are known."""
    ids_KxR = np.empty((sum(bag.index_hxR.shape[0] for bag in bags), bags[0].index_hxR.shape[1]), np.int32)
    start = 0
    for bag in bags:
        bag.slots(out_hxR=ids_KxR[start : start + bag.index_hxR.shape[0]])
        start += bag.index_hxR.shape[0]
    return np.ascontiguousarray(ids_KxR.T)


def _used(bag: Bags) -> np.ndarray:
    """Which keys some row has. All of them in a column fresh from its parser, unless one of them means missing."""
    if bag.ordered and bag.index_hxR.shape[0] == 1 and bag.index_hxR.min(initial=0) >= 0:
        return np.ones(len(bag.keys_U), bool)
    used = np.zeros(len(bag.keys_U) + 1, bool)
    used[bag.index_hxR] = True
    return used[:-1]


def _first_places(bags: list[Bags]) -> list[np.ndarray]:
    """For each key the place (row by row, slot by slot) where it first occurs."""
    width = sum(bag.index_hxR.shape[0] for bag in bags)
    places, column = [], 0
    for bag in bags:
        hotness, num_rows = bag.index_hxR.shape
        place_hxR = np.arange(num_rows) * width + np.arange(column, column + hotness)[:, None]
        first = np.full(len(bag.keys_U) + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, bag.index_hxR.ravel(), place_hxR.ravel())
        places.append(first[:-1])
        column += hotness
    return places


class Background:
    """Runs one call at a time in a thread of its own, each after the one before; leaving waits for the last."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Background":
        return self

    def run(self, call: Callable[..., None], *arguments: Any) -> None:
        """Start a call when the last one has ended; raises what that one raised."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(call, *arguments)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        del kind, traceback
        self._pool.shutdown()
        if self._last is not None and error is None:
            self._last.result()


class Pending:
    """Rows and keys since the last staged file."""

    def __init__(self) -> None:
        self.num_chunks = 0
        self._parts: list[tuple[dict[str, np.ndarray], list[Bags]]] = []
        self._additions: dict[int, list[Additions]] = {}
        self._next = Position()
        self._batches: list[tuple[int, int]] = []
        self._truncated: list[int] = []
        self._skipped: collections.Counter[str] = collections.Counter()
        self._examples: list[str] = []
        self._times = {"dates": 0, "numbers": 0}
        self._label_texts: dict[int, collections.Counter[str]] = {}
        self._names: set[str] = set()
        self._first_rows: list[list[Any]] = []

    def add(self, parsed: Parsed, path: str, row: int) -> None:
        """Take a chunk whose first row is number `row` of the log."""
        columns = {**parsed.columns, "row": parsed.columns["row"] + row}
        is_date_R = columns.pop(IS_DATE, None)
        if is_date_R is not None:
            self._times["dates"] += int(is_date_R.sum())
            self._times["numbers"] += int((~is_date_R).sum())
        self.num_chunks += 1
        if parsed.num_kept or not self._parts:
            self._parts.append((columns, parsed.bags))
            self._batches.append((parsed.chunk.file, parsed.num_kept))
        self._next = parsed.chunk.next
        truncated = [0 if bag.truncated_R is None else int(bag.truncated_R.sum()) for bag in parsed.bags]
        self._truncated = [a + b for a, b in zip(self._truncated or [0] * len(truncated), truncated, strict=True)]
        counts = self._label_texts.setdefault(parsed.chunk.file, collections.Counter())
        for text, count in parsed.label_texts.items():
            counts[text if text in counts or len(counts) < MAX_LABEL_TEXTS else OTHER_TEXTS] += count
        self._names.update(parsed.names or ())
        if row == 0:
            self._first_rows = parsed.first_rows
        for bad in parsed.bad:
            self._skipped[f"column {bad.column}: {bad.reason}" if bad.column else bad.reason] += 1
            if len(self._examples) < MAX_EXAMPLES:
                self._examples.append(bad.describe(path))

    def extend(self, table: int, addition: Additions | None) -> None:
        """Take the new keys of a table."""
        if addition is not None:
            self._additions.setdefault(table, []).append(dataclasses.replace(addition, table=table))

    def write(self, staging: Staging, index: int, row: int) -> None:
        """Stage it all as file `index`; the log's next row is number `row`."""
        meta = {
            "batches": self._batches,
            "next": dataclasses.asdict(self._next),
            "row": row,
            "truncated": self._truncated,
            "times": self._times,
            "skipped": dict(self._skipped),
            "examples": self._examples,
            "label_texts": [[file, dict(counts)] for file, counts in self._label_texts.items()],
            "names": sorted(self._names),
            "first_rows": self._first_rows,
        }
        merged = [_join(self._additions[table]) for table in sorted(self._additions)]
        staging.write(index, [columns | {"ids": ids_matrix(bags)} for columns, bags in self._parts], merged, meta)
