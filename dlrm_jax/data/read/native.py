"""blocks.cc, compiled at first use, as ctypes has it: reads and checks blocks, and puts their rows into windows."""

import ctypes
import functools
import logging
import pathlib
import threading
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.host.native_code import built

BLOCKS = pathlib.Path(__file__).with_name("blocks.cc")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_LOCK = threading.Lock()
_LOG = logging.getLogger("dlrm_jax")


def library() -> Any:
    """The library; None where no compiler makes it, which the log says: NumPy and array_record do the same, slower."""
    with _LOCK:  # Two threads that need it would compile it twice.
        return _made()


@functools.cache
def _made() -> Any:
    try:
        made = ctypes.CDLL(str(built(BLOCKS)))
    except (ConfigError, OSError) as error:
        _LOG.info("rows are read slower than C++ would read them: %s", error)
        return None
    made.dlrm_reads.restype = _INT
    made.dlrm_read_chunks.argtypes, made.dlrm_read_chunks.restype = (_INT, *[_POINTER] * 6), None
    made.dlrm_any_outside.argtypes, made.dlrm_any_outside.restype = (_POINTER, _INT, _INT, _POINTER), _INT
    made.dlrm_scatter.argtypes = (_POINTER, _POINTER, *[_INT] * 3, _POINTER, _INT, _POINTER)
    made.dlrm_places.argtypes = (_POINTER, _INT, _INT, _POINTER)
    made.dlrm_scatter.restype = made.dlrm_places.restype = None
    made.dlrm_fill.argtypes = (_POINTER, _INT, *[_POINTER] * 4, _INT, *[_POINTER] * 5)
    made.dlrm_fill.restype = None
    made.dlrm_permutation.argtypes, made.dlrm_permutation.restype = (_POINTER, _POINTER, _POINTER, _INT), None
    seed = (0, 1)
    if not np.array_equal(permutation(made, seed, 5000), np.random.default_rng(seed).permutation(5000)):
        _LOG.info(
            "this NumPy draws permutations otherwise than blocks.cc: rows are read slower than C++ would read them"
        )
        return None
    return made


class Layout(ctypes.Structure):
    """As blocks.cc has it."""

    _fields_ = (
        *(
            (name, _INT)
            for name in ("size", "rows", "num_gaps", "ids", "slots", "num_columns", "weighted", "row_bytes")
        ),
        *((name, _POINTER) for name in ("gaps", "between", "columns", "widths", "limits_K")),
    )


def permutation(library: Any, seed: tuple[int, ...], count: int) -> np.ndarray:
    """`np.random.default_rng(seed).permutation(count)`, in half the time."""
    generator, made = np.random.default_rng(seed).bit_generator, np.empty(count, np.int64)
    drawing = generator.ctypes
    draw = ctypes.cast(drawing.next_uint32, _POINTER)
    library.dlrm_permutation(draw, drawing.state_address, address(made), count)
    return made


def address(array: np.ndarray) -> int:
    """Where a NumPy array begins; `array.ctypes` takes longer."""
    return int(array.__array_interface__["data"][0])
