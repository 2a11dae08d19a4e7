"""How far a preparation is, for who waits for it."""

import sys
import time

from tqdm import tqdm

from dlrm_jax.data.prepare.preparation import Progress


class Bar:
    """One bar a pass with rows/s and time left on a terminal, and a plain line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._phase = ""
        self._start = self._last = time.perf_counter()
        self._start_rows = 0
        self._start_fraction = 0.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        now = time.perf_counter()
        if progress.phase != self._phase:
            self._phase, self._start, self._last = progress.phase, now, now
            self._start_rows, self._start_fraction = progress.rows, progress.fraction
            if self._bar is not None:
                self._bar.close()
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
            self._bar = tqdm(total=1.0, desc=progress.phase, bar_format=layout, disable=not self._terminal)
        seconds, done = max(now - self._start, 1e-9), progress.fraction - self._start_fraction
        rate = (progress.rows - self._start_rows) / seconds
        if self._bar is not None and self._terminal:
            self._bar.set_postfix_str(f"{progress.rows:,} rows, {rate:,.0f} rows/s", refresh=False)
            self._bar.update(progress.fraction - self._bar.n)
        elif now - self._last > 5 and done > 0:
            self._last = now
            left = (1 - progress.fraction) * seconds / done
            rows = f"{progress.rows:,} rows  {rate:,.0f} rows/s  {left:.0f} s left"
            print(f"{progress.phase} {progress.fraction:.0%}  {rows}", file=sys.stderr, flush=True)
