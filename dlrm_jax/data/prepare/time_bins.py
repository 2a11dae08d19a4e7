"""Rows and positives over time, as a histogram that can be gone on with."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NUM_TIME_BINS = 100


class TimeBins:
    """Rows and positives over time: at most 100 bins of 2^k, that begin at its multiples.

    So wider bins are sums of narrower ones, and what is counted does not depend on the order of the rows, nor on how
    many of them were known when.
    """

    def __init__(self, width: int = 1, bins: Iterable[Sequence[int]] = (), low: int = 0, high: int = -1) -> None:
        self._width, self.low, self.high = width, low, high
        self._counts = {int(start) // width: np.array([rows, positives]) for start, rows, positives in bins}

    def add(self, time_R: np.ndarray, label_R: np.ndarray) -> None:
        """Count some rows."""
        if not len(time_R):
            return
        low, high = int(time_R.min()), int(time_R.max())
        if self._counts:
            low, high = min(low, self.low), max(high, self.high)
        self.low, self.high = low, high
        while high // self._width - low // self._width >= NUM_TIME_BINS:
            self._width, counts = 2 * self._width, self._counts
            self._counts = {}
            for place, count in counts.items():
                self._counts[place // 2] = self._counts.get(place // 2, 0) + count
        place_R = time_R // self._width
        first = int(place_R.min())
        rows, positives = np.bincount(place_R - first), np.bincount(place_R - first, label_R).astype(np.int64)
        for i in np.flatnonzero(rows).tolist():
            self._counts[first + i] = self._counts.get(first + i, 0) + np.array([rows[i], positives[i]])

    def summary(self) -> dict[str, Any]:
        """As statistics.json has it."""
        places = range(self.low // self._width, self.high // self._width + 1)
        bins = [[place * self._width, *map(int, self._counts.get(place, (0, 0)))] for place in places]
        return {"bin_width": self._width, "time_range": [self.low, self.high], "positives_over_time": bins}
