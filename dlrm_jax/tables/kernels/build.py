"""The C++ of this folder: where it is, and its functions given to XLA."""

import ctypes
import functools
import pathlib

import jax

from dlrm_jax.host.native_code import built

TABLES, SCORE = map(pathlib.Path(__file__).with_name, ("tables.cc", "score.cc"))
TARGETS = ("dlrm_lookup", "dlrm_update_sgd", "dlrm_update_adagrad", "dlrm_update_rowwise_adagrad")


@functools.cache
def register() -> None:
    """Make TARGETS known to XLA on CPUs; compiles them first where no earlier run did.

    Raises ConfigError without a C++ compiler, or where it fails.
    """
    # A version in a definition, as the headers' path need not have it.
    options = ("-isystem", jax.ffi.include_dir(), f"-DJAXLIB={jax.lib.__version__}")
    library = ctypes.CDLL(str(built(TABLES, options)))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
