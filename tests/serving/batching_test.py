"""The queue before the model: one execution for many, one answer for each, bounded in rows and in time."""

import asyncio
import threading
import time

import numpy as np
import pytest

from dlrm_jax.serving.artifact.errors import Busy, TooLate
from dlrm_jax.serving.artifact.loaded import Scores
from dlrm_jax.serving.http.batching import Batcher
from dlrm_jax.serving.http.telemetry import Telemetry


class Fake:
    """Scores a row by its first number; `hold` keeps it from finishing."""

    def __init__(self, offset: float = 0.0) -> None:
        self.batches: list[int] = []
        self.weights = object()
        self.offset, self.hold = offset, threading.Event()
        self.hold.set()

    def score(self, dense, ids) -> Scores:
        self.hold.wait(10)
        self.batches.append(len(dense))
        if dense[0, 0] < 0:
            raise RuntimeError("no")
        return Scores(dense[:, 0] + self.offset, dense[:, 0])


def rows(*values):
    dense = np.array(values, np.float32)[:, None]
    return dense, np.zeros((len(values), 1), np.int32)


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def with_batcher(work, **changes):
    async def main():
        batcher = Batcher(Telemetry(), **({"max_batch": 8, "max_delay": 0.0, "max_queued_rows": 10} | changes))
        batcher.start()
        try:
            return await work(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(main())


async def started(batcher, fake, *values):
    """A request that the thread already works on."""
    task = asyncio.create_task(batcher.score(fake, *rows(*values), soon()))
    while batcher.queued_rows or not batcher._running:
        await asyncio.sleep(0.001)
    return task


@pytest.mark.parametrize("turns", range(4))
def test_an_end_that_comes_just_behind_a_request_is_not_lost(turns):
    async def work(batcher):
        waiting = [asyncio.create_task(batcher.score(Fake(), *rows(1.0), soon()))]
        await asyncio.sleep(0.01)  # It waits for company.
        waiting.append(asyncio.create_task(batcher.score(Fake(), *rows(2.0), soon())))
        for _ in range(turns):
            await asyncio.sleep(0)
        await batcher.stop()
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, Busy)

    with_batcher(work, max_delay=5.0)


def test_who_waits_together_is_computed_together_and_gets_its_own():
    fake = Fake()

    async def work(batcher):
        fake.hold.clear()
        first = await started(batcher, fake, 1)
        others = [asyncio.create_task(batcher.score(fake, *rows(i, i + 0.5), soon())) for i in range(2, 7)]
        await asyncio.sleep(0.01)
        fake.hold.set()
        return [(await task).probability.tolist() for task in (first, *others)]

    assert with_batcher(work) == [[1], [2, 2.5], [3, 3.5], [4, 4.5], [5, 5.5], [6, 6.5]]
    assert fake.batches == [1, 8, 2]


def test_a_batch_waits_for_company_at_most_its_delay():
    fake = Fake()

    async def work(batcher):
        start = time.monotonic()
        tasks = [asyncio.create_task(batcher.score(fake, *rows(1), soon()))]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(batcher.score(fake, *rows(2), soon())))
        await asyncio.gather(*tasks)
        return time.monotonic() - start

    assert 0.2 <= with_batcher(work, max_delay=0.2) < 5 and fake.batches == [2]


def test_a_full_queue_refuses_at_once():
    fake = Fake()

    async def work(batcher):
        fake.hold.clear()
        tasks = [await started(batcher, fake, 1)]
        tasks.append(asyncio.create_task(batcher.score(fake, *rows(*range(10)), soon())))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="10 rows wait already; at most 10") as refusal:
            await batcher.score(fake, *rows(3), soon())
        assert refusal.value.retry_after > 0
        fake.hold.set()
        await asyncio.gather(*tasks)
        return (await batcher.score(fake, *rows(4), soon())).probability.tolist()

    assert with_batcher(work) == [4]


def test_who_would_wait_too_long_is_refused_at_once():
    fake = Fake()

    async def work(batcher):
        await batcher.score(fake, *rows(1), soon())
        assert 0 < batcher._seconds_of[0] < 10  # It was measured.
        batcher._seconds_of[0] = 10.0
        fake.hold.clear()
        running = await started(batcher, fake, 2)
        assert 5 < batcher.expected_wait() <= 10
        with pytest.raises(Busy, match=r"would wait \d+ ms, more than 5000"):
            await batcher.score(fake, *rows(3), soon())
        assert not running.done()
        fake.hold.set()
        await running
        with pytest.raises(Busy, match=r"would wait 6\d\d\d ms"):
            batcher.admit(waited=6.0)
        batcher.admit(waited=1.0)
        return (await batcher.score(fake, *rows(4), soon())).probability.tolist()

    assert with_batcher(work, max_wait=5.0) == [4]


def test_heads_that_come_together_count_each_other():
    fake = Fake()

    async def work(batcher):
        for _ in range(100):
            await batcher.score(fake, *rows(*range(4)), soon())
        batcher._seconds_of = {2: 1.0, 3: 1.0}
        for _ in range(3):  # Eight rows, two requests of four, are a second.
            batcher.announce()
        with pytest.raises(Busy, match=r"would wait \d+ ms, more than 1500"):
            batcher.announce()
        await asyncio.sleep(0)
        batcher.announce()  # Another turn, in which those before did not come.

    with_batcher(work, max_wait=1.5)


def test_full_batches_ahead_are_counted():
    fake = Fake()

    async def work(batcher):
        batcher._seconds_of = {0: 1.0, 3: 100.0}
        fake.hold.clear()
        tasks = [await started(batcher, fake, 1)]
        tasks += [asyncio.create_task(batcher.score(fake, *rows(*range(8)), soon())) for _ in range(3)]
        await asyncio.sleep(0)
        waits = batcher.expected_wait()
        fake.hold.set()
        await asyncio.gather(*tasks)
        return waits

    assert 300 <= with_batcher(work, max_queued_rows=100) <= 301


def test_time_runs_out_in_the_queue_and_in_the_thread():
    fake = Fake()

    async def work(batcher):
        fake.hold.clear()
        running = asyncio.create_task(batcher.score(fake, *rows(1), soon(0.05)))
        await asyncio.sleep(0.01)
        queued = asyncio.create_task(batcher.score(fake, *rows(2), soon(0.05)))
        for task in (running, queued):
            with pytest.raises(TooLate, match="not scored within"):
                await task
        fake.hold.set()
        return (await batcher.score(fake, *rows(3), soon())).probability.tolist()

    assert with_batcher(work) == [3] and 2 not in fake.batches


def test_versions_are_not_mixed():
    old, new = Fake(), Fake(offset=100)

    async def work(batcher):
        old.hold.clear()
        first = await started(batcher, old, 1)
        others = [asyncio.create_task(batcher.score(fake, *rows(2), soon())) for fake in (old, new, old)]
        await asyncio.sleep(0.01)
        old.hold.set()
        return [(await task).probability.tolist() for task in (first, *others)]

    assert with_batcher(work) == [[1], [2], [102], [2]]


def test_a_failure_is_told_to_its_batch_and_ends_there():
    fake = Fake()

    async def work(batcher):
        with pytest.raises(RuntimeError, match="no"):
            await batcher.score(fake, *rows(-1), soon())
        return (await batcher.score(fake, *rows(5), soon())).probability.tolist()

    assert with_batcher(work) == [5]
