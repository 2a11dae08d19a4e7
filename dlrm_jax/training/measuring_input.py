"""The road from the data to the devices, measured alone and by stage: reading, decoding, permuting, transfer."""

import contextlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.pipeline import Cut, batch_windows, train_epochs
from dlrm_jax.data.read.prepared import PreparedSplit
from dlrm_jax.data.read.windows import MOST_READERS, GeneratedSplit
from dlrm_jax.host import heap
from dlrm_jax.host.cores import cores
from dlrm_jax.training.feed import Feed, make_feed
from dlrm_jax.training.opening import open_run
from dlrm_jax.training.run_config import RunConfig

READ, DECODE, MAKE, PERMUTE, PLACE, TRANSFER = "read", "decode", "make", "permute", "place", "transfer"
HOST, ROAD = "host", "road"


def measure_input(config: RunConfig, seconds: float, workdir: pathlib.Path | None = None) -> dict[str, Any]:
    """Rows a second of each stage by all the threads that it has, and of the whole road, each for some `seconds`.

    `binds` is the slowest stage. Stages share the cores, so that the road is slower than each of them. Rows in memory
    need no reading; those that are generated are made instead of read, by the host even where a run's steps make them;
    where blocks.cc reads, rows are decoded and permuted as they are put in their places.
    """
    opened = open_run(config, workdir)
    placed, rows = opened.place(), opened.dataset.splits["train"]
    heap.keep_freed_temporaries()  # As a run does.
    cut = Cut(config.batch_size, multiple=placed.num_devices * config.num_micro_batches)
    feed = make_feed(placed, opened.dataset, rows, cut)
    stages, window_rows = _reading(rows, seconds), feed.cut.steps * feed.cut.rows
    road = {HOST: _to_host(feed, config, window_rows, seconds), ROAD: _to_devices(feed, config, window_rows, seconds)}
    window = next(rows.windows(config.seed, 0, config.shuffle))
    permuted = batch_windows((iter([window]) for _ in itertools.count()), feed.cut)
    if DECODE in stages or not isinstance(rows, PreparedSplit):
        stages[PERMUTE] = _rate(window_rows, permuted, seconds)
    else:  # Rows are put in their places as they are read.
        stages[PLACE] = _rest(road[HOST], stages[READ])
    one, put = next(permuted), feed.transfer
    stages[TRANSFER] = _rate(window_rows, (jax.block_until_ready(put(one)) for _ in itertools.count()), seconds)
    return {
        "rows_per_second": stages | road,
        "binds": min(stages, key=lambda stage: stages[stage]),
        "threads": min(cores(), MOST_READERS),
        "batch_size": config.batch_size,
        "batches_a_window": feed.cut.steps,
    }


def _reading(rows: Any, seconds: float) -> dict[str, float]:
    """Of what is not in memory, the stages before a window's rows are there."""
    if isinstance(rows, Split):
        return {}
    groups = itertools.cycle([visit().blocks_G for visit in rows.order.visits(0, 0, shuffle=True)])
    size = rows.order.rows_of(next(rows.order.visits(0, 0, shuffle=True))().blocks_G)

    def rate(work: Callable[[np.ndarray], Any]) -> float:
        readers = min(cores(), MOST_READERS)
        with ThreadPoolExecutor(readers) as pool:
            batches = (list(pool.map(work, itertools.islice(groups, readers))) for _ in itertools.count())
            return _rate(size * readers, batches, seconds)

    if isinstance(rows, GeneratedSplit):
        return {MAKE: rate(rows.read)}
    assert isinstance(rows, PreparedSplit)
    blocks = rows.blocks
    read = rate(lambda blocks_G: list(blocks.records([int(block) % len(blocks) for block in blocks_G], rows.library)))
    if rows.library is not None:
        return {READ: read}
    return {READ: read, DECODE: _rest(rate(rows.read), read)}


def _rest(both: float, one: float) -> float:
    """The rate of the other of two stages, by that of both, one after the other."""
    return 1 / max(1 / both - 1 / one, 1e-12)


def _rate(rows: int, work: Iterable[Any], seconds: float) -> float:
    """Rows a second, each item of `work` being `rows` of them; the first one warms up."""
    items = iter(work)
    next(items)
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
        next(items)
        count += 1
    return rows * count / (time.perf_counter() - start)


def _to_host(feed: Feed, config: RunConfig, window_rows: int, seconds: float) -> float:
    epochs = train_epochs(feed.split, config.batch_size, config.seed, 0, config.shuffle)
    with contextlib.closing(batch_windows(epochs, feed.cut)) as windows:
        return _rate(window_rows, windows, seconds)


def _to_devices(feed: Feed, config: RunConfig, window_rows: int, seconds: float) -> float:
    with feed.train_windows(config.seed, 0, config.shuffle) as windows:
        return _rate(window_rows, (jax.block_until_ready(window) for _, window in windows), seconds)


def text(numbers: dict[str, Any]) -> str:
    """The numbers for people, in two lines."""
    rates = numbers["rows_per_second"]
    shown = ", ".join(f"{stage} {rate / 1e6:,.1f}" for stage, rate in rates.items() if stage not in (HOST, ROAD))
    return (
        f"input: {rates[HOST] / 1e6:,.1f} M rows/s ready on the host, {rates[ROAD] / 1e6:,.1f} on the devices, in "
        f"windows of {numbers['batches_a_window']} batches "
        f"of {numbers['batch_size']:,}, by {numbers['threads']} threads\n"
        f"  each stage alone, M rows/s: {shown}; {numbers['binds']} binds"
    )
