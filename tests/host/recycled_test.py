"""Memory is used again when nobody has an array of it any more, and not before (`recycled.py`)."""

import concurrent.futures

import numpy as np
import pytest

from dlrm_jax.host.recycled import Recycler


def place(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize(("shape", "dtype"), [((3, 5), np.int32), ((0, 4), np.float32), ((5_000_000,), np.uint8)])
def test_memory_comes_back_with_the_last_view(shape, dtype):
    memory = Recycler()
    first = memory.empty(shape, dtype)
    assert first.shape == shape and first.dtype == dtype and place(first) % 4096 == 0
    first[:] = 7
    view, where = first[1:], place(first)
    del first
    other = memory.empty(shape, dtype)
    other[:] = 1
    assert place(other) != where and (view == 7).all()
    del view
    assert place(memory.empty(shape, dtype)) == where


def test_threads_never_share_an_array():
    memory = Recycler()

    def work(number: int) -> bool:
        arrays = [memory.empty((1000,), np.int64) for _ in range(3)]
        for array in arrays:
            array[:] = number
        return all((array == number).all() for array in arrays)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(500)))
