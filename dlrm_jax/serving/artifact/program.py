"""The forward pass of an exported model, as StableHLO: read, checked, compiled for each batch size."""

import contextlib
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from dlrm_jax.config import ConfigError, how_to_install, require
from dlrm_jax.host import native_code

_READER = f"from {__name__} import read_standard_input; read_standard_input()"
_READ_SECONDS = 120.0
"""For Python, JAX and the program to be read in a process of its own; it takes two."""


class Program:
    """A compiled forward pass, one executable a batch size, for any weights of its shapes."""

    def __init__(self, serialized: bytes) -> None:
        try:
            exported = jax_export.deserialize(bytearray(serialized))
            module = exported.mlir_module()
        except ImportError:
            raise ConfigError(f"reading StableHLO needs flatbuffers: {how_to_install('serve')}") from None
        except Exception as error:  # Whatever flatbuffers and MLIR raise for bytes that no export wrote.
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"program.stablehlo cannot be read: {reason}; export anew") from error
        _require_harmless(module)
        self.serialized, self._call = serialized, jax.jit(exported.call)
        self._compiled: dict[int, Any] = {}
        self._lock = threading.Lock()

    def compiled(self, weights: Mapping[str, jax.Array], size: int, num_dense: int, num_slots: int) -> Any:
        """The executable for batches of `size`; made now if it is not there."""
        with self._lock:
            if size not in self._compiled:
                dense = jax.ShapeDtypeStruct((size, num_dense), np.float32)
                ids = jax.ShapeDtypeStruct((size, num_slots), np.int32)
                self._compiled[size] = self._call.lower(weights, dense, ids).compile()
            return self._compiled[size]


_HARMFUL = re.compile(
    r"(?:stablehlo|mhlo)\.(?:infeed|outfeed|send|recv)\b|custom_call(?! @shape_assertion\()[^(]{0,60}"
)
"""What no export contains: what waits for others, and functions of this process, given any pointer."""


def _require_harmless(module: str) -> None:
    found = _HARMFUL.search(module)
    require(
        found is None, f"program.stablehlo has {found[0] if found else ''!r}, which no export contains; export anew"
    )


def require_read_apart(serialized: bytes) -> None:
    """ConfigError unless another process reads this program to its end.

    MLIR's reader is not made for bytes that no compiler wrote: some of them end the process that reads them. A server
    lets another one go first, which needs no accelerator and takes two seconds, most of them to load JAX. Of a program
    that was read so a mark is kept, where only this user may write.
    """
    with contextlib.suppress(ConfigError, OSError):  # Without such a place each is read anew.
        if _mark(serialized).exists():
            return
    command = [sys.executable, "-c", _READER]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        ended = subprocess.run(
            command, input=serialized, capture_output=True, env=environment, timeout=_READ_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"program.stablehlo was not read in {_READ_SECONDS:.0f} s; export anew") from None
    said = ended.stdout.decode(errors="replace").strip()
    require(ended.returncode >= 0, f"program.stablehlo ends who reads it (signal {-ended.returncode}); export anew")
    require(ended.returncode == 0, said or f"program.stablehlo was not read: {_last_line(ended.stderr)}; export anew")
    with contextlib.suppress(ConfigError, OSError):
        _mark(serialized).touch()


def _mark(serialized: bytes) -> pathlib.Path:
    """The file that is there once this version of JAX has read this program."""
    told = hashlib.sha256(serialized + jax.__version__.encode()).hexdigest()[:32]
    return native_code.own_directory() / f"program-{told}.read"


def read_standard_input() -> None:
    """Read a program from standard input; exit with 1, and say why, where it cannot be."""
    try:
        Program(sys.stdin.buffer.read())
    except ConfigError as error:
        sys.exit(print(error) or 1)


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no reason was given"])[-1][:200]
