"""What devices can do: the one table of constants behind every prediction, each with its source."""

import dataclasses
import re
from typing import Any

from dlrm_jax.config import ConfigError
from dlrm_jax.host import memory


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its links. Rates are what good code reaches, not what the data sheet's peak says.

    `memory_rate`, `link_rate` in bytes/s (the link's in one direction, to all peers together), `flops` of float32
    matrix products as the backend computes them by default; `latency` of one collective and `launch` of one kernel in
    seconds; `row_efficiency` is the share of `memory_rate` that reading single rows of 64 bytes reaches;
    `on_chip_bytes` of a step's temporaries stay in vector memory. `assumed`: the table does not know the device.
    """

    name: str
    memory_bytes: float
    memory_rate: float
    flops: float
    link_rate: float
    latency: float
    launch: float
    row_efficiency: float
    source: str
    on_chip_bytes: int = 0
    assumed: bool = False
    is_cpu: bool = False


_SHEET = "data sheet; 0.9 of its memory rate, as measured on an H100 (3.0 of 3.35 TB/s)"
_TPU = "Google Cloud's TPU system architecture pages; 0.87 of the memory rate and half of the links (torus) assumed"

_SHEET_ONLY = "data sheet; 0.8 of its peak and 0.9 of its memory rate assumed, as measured on an H100"
_PCIE = 25e9
"""Bytes/s of 16 lanes of PCIe 4, in one direction."""

_ON_CHIP = 64 << 20
"""Half the vector memory of a v5e or v6e: what compiled steps place there (memory space 1). On a v5p it was none."""

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100", 80e9, 3.0e12, 400e12, 450e9, 15e-6, 2.5e-6, 0.5, _SHEET + "; TF32"),
        Hardware("h200", 141e9, 4.3e12, 400e12, 450e9, 15e-6, 2.5e-6, 0.5, _SHEET + "; TF32"),
        Hardware("a100", 80e9, 1.75e12, 125e12, 300e9, 15e-6, 2.5e-6, 0.5, _SHEET + "; TF32"),
        Hardware("b200", 180e9, 7.0e12, 900e12, 900e9, 15e-6, 2.5e-6, 0.5, _SHEET_ONLY + "; TF32"),
        Hardware("l40s", 48e9, 0.78e12, 146e12, _PCIE, 15e-6, 2.5e-6, 0.5, _SHEET_ONLY + "; TF32"),
        Hardware("l4", 24e9, 0.27e12, 48e12, _PCIE, 15e-6, 2.5e-6, 0.5, _SHEET_ONLY + "; TF32"),
        Hardware("a10g", 24e9, 0.54e12, 28e12, _PCIE, 15e-6, 2.5e-6, 0.5, _SHEET_ONLY + "; TF32"),
        Hardware("t4", 16e9, 0.29e12, 6.5e12, 12e9, 15e-6, 2.5e-6, 0.5, _SHEET_ONLY + "; float32"),
        Hardware("v100", 16e9, 0.81e12, 12.5e12, 150e9, 15e-6, 2.5e-6, 0.5, _SHEET_ONLY + "; float32"),
        Hardware("rtx4090", 24e9, 0.9e12, 66e12, _PCIE, 15e-6, 2.5e-6, 0.5, _SHEET_ONLY + "; TF32"),
        Hardware("mi300x", 192e9, 4.8e12, 130e12, 448e9, 15e-6, 5e-6, 0.5, _SHEET_ONLY + "; float32 matrices"),
        Hardware(
            "mi250x", 64e9, 1.44e12, 38e12, 200e9, 15e-6, 5e-6, 0.5, _SHEET_ONLY + "; one of a module's two chips"
        ),
        Hardware("v2", 8e9, 0.3e12, 20e12, 60e9, 5e-6, 1e-6, 0.25, _TPU + "; one of a chip's two cores"),
        Hardware("v3", 16e9, 0.39e12, 53e12, 80e9, 5e-6, 1e-6, 0.25, _TPU + "; one of a chip's two cores"),
        Hardware("v4", 32e9, 1.05e12, 240e12, 130e9, 5e-6, 1e-6, 0.25, _TPU),
        Hardware("v5e", 16e9, 0.71e12, 170e12, 100e9, 5e-6, 1e-6, 0.25, _TPU, _ON_CHIP),
        Hardware("v5p", 95e9, 2.4e12, 400e12, 300e9, 5e-6, 1e-6, 0.25, _TPU),
        Hardware("v6e", 32e9, 1.4e12, 800e12, 180e9, 5e-6, 1e-6, 0.25, _TPU, _ON_CHIP),
        Hardware("tpu7x", 96e9, 3.2e12, 1000e12, 300e9, 5e-6, 1e-6, 0.25, _TPU + "; one of a chip's two cores"),
        Hardware("cpu", 16e9, 20e9, 100e9, 5e9, 50e-6, 5e-6, 0.5, "two cores of an EPYC server, measured", is_cpu=True),
    )
}


def find(name: str) -> Hardware:
    """The entry called `name`; ConfigError naming those there are."""
    if name not in HARDWARE:
        raise ConfigError(f"--hardware={name} is not known; choose one of {', '.join(HARDWARE)}, or --calibrate")
    return HARDWARE[name]


_TPU_KINDS = {
    **{"tpu v2": "v2", "tpu v3": "v3", "tpu v4": "v4", "tpu7": "tpu7x", "tpu7x": "tpu7x"},
    **{"tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p"},
    **{"tpu v6 lite": "v6e", "tpu v6e": "v6e"},
}
"""device_kind, in small letters -> entry. JAX calls a v5p "TPU v5" (jax/_src/pallas/mosaic/tpu_info.py)."""

_GPU_WORDS = {
    **{name: name for name in ("b200", "h200", "h100", "a100", "l40s", "l4", "a10g", "t4", "v100", "mi300x", "mi250x")},
    **{"gb200": "b200", "gh200": "h200", "4090": "rtx4090", "mi250": "mi250x"},
}
"""A word of a GPU's device_kind, as "NVIDIA H100 80GB HBM3" or "Tesla V100-SXM2-16GB" -> entry."""

_ASSUMED = {"tpu": "v5e"}
_ASSUMED_GPU = "a100"
"""Whose rates another TPU, and another accelerator, is planned with."""


def of_device(device: Any, num_devices: int = 1) -> Hardware:
    """What the table knows of one of JAX's devices, with the memory that it has; `num_devices` share a CPU's."""
    total = memory.device_total(device, num_devices)
    return at_hand(device.device_kind, device.platform, num_devices, total)


def at_hand(device_kind: str, platform: str, num_devices: int = 1, memory_bytes: float | None = None) -> Hardware:
    """The entry of a device as JAX describes it, or one whose rates are assumed and whose name and source say so.

    `memory_bytes` is what it really has. A CPU's rates are shared by `num_devices`.
    """
    if platform == "cpu":
        cpu = HARDWARE["cpu"]
        shared = {name: getattr(cpu, name) / num_devices for name in ("memory_rate", "flops", "link_rate")}
        shared["memory_bytes"] = memory_bytes or cpu.memory_bytes / num_devices
        return dataclasses.replace(cpu, launch=cpu.launch * num_devices, latency=cpu.latency * num_devices, **shared)
    known = _entry(device_kind.lower())
    if known is not None:
        return dataclasses.replace(known, memory_bytes=memory_bytes or known.memory_bytes)
    like = HARDWARE[_ASSUMED.get(platform, _ASSUMED_GPU)]
    what = "its rates" if memory_bytes else "its memory and rates"
    return dataclasses.replace(
        like,
        name=device_kind,
        memory_bytes=memory_bytes or like.memory_bytes,
        source=f"not in the table: {what} are assumed to be {like.name}'s; --calibrate measures them",
        assumed=True,
    )


def _entry(device_kind: str) -> Hardware | None:
    words = re.split(r"[^a-z0-9]+", device_kind)
    found = [_GPU_WORDS[word] for word in words if word in _GPU_WORDS]
    name = _TPU_KINDS.get(device_kind) or next(iter(found), None)
    return HARDWARE[name] if name else None
