"""Adding to rows that several slots share, on NVIDIA GPUs: a trap of jaxlib 0.10.2 and 0.11.0, and the way around.

Their XLA compiles an atomic float32 addition into a loop of compare and swap, hundreds of times as slow where a whole
batch adds to the few rows of a small table (openxla/xla#46225; 0.11.1 no longer does). An option of the compiler brings
back the hardware's own addition, which flushes denormal sums to zero, as XLA did before.
"""

import importlib.metadata
import importlib.util
import os

AFFECTED = ("0.10.2", "0.11.0")
OPTION = "-nvptx-allow-ftz-atomics"
_FLAG = "--xla_backend_extra_options="
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def use_hardware_additions() -> None:
    """Set XLA_FLAGS so, where jaxlib is affected and has CUDA; only before the first use of a device is it in time."""
    affected = importlib.metadata.version("jaxlib") in AFFECTED
    if affected and any(importlib.util.find_spec(plugin) for plugin in _CUDA_PLUGINS):
        os.environ["XLA_FLAGS"] = with_option(os.environ.get("XLA_FLAGS", ""))


def with_option(xla_flags: str) -> str:
    """The flags with the option among the backend's extra ones, once."""
    flags = xla_flags.split()
    options = [option for flag in flags if flag.startswith(_FLAG) for option in flag[len(_FLAG) :].split(",")]
    others = [flag for flag in flags if not flag.startswith(_FLAG)]
    if not any(option.startswith(OPTION) for option in options):
        options.append(OPTION)
    return " ".join([*others, _FLAG + ",".join(options)])
