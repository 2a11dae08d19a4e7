"""What devices can do: the one table of constants behind every prediction, each with its source."""

import dataclasses

from dlrm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its links. Rates are what good code reaches, not what the data sheet's peak says.

    `memory_rate`, `link_rate` in bytes/s (the link's in one direction, to all peers together), `flops` of float32
    matrix products as the backend computes them by default; `latency` of one collective and `launch` of one kernel in
    seconds; `row_efficiency` is the share of `memory_rate` that reading single rows of 64 bytes reaches;
    `on_chip_bytes` of a step's temporaries stay in vector memory.
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


_SHEET = "data sheet; 0.9 of its memory rate, as measured on an H100 (3.0 of 3.35 TB/s)"
_TPU = "Google Cloud's TPU system architecture pages; 0.87 of the memory rate and half of the links (torus) assumed"

_ON_CHIP = 64 << 20
"""Half the vector memory of a v5e or v6e: what compiled steps place there (memory space 1). On a v5p it was none."""

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100", 80e9, 3.0e12, 400e12, 450e9, 15e-6, 2.5e-6, 0.5, _SHEET + "; TF32"),
        Hardware("h200", 141e9, 4.3e12, 400e12, 450e9, 15e-6, 2.5e-6, 0.5, _SHEET + "; TF32"),
        Hardware("a100", 80e9, 1.75e12, 125e12, 300e9, 15e-6, 2.5e-6, 0.5, _SHEET + "; TF32"),
        Hardware("v4", 32e9, 1.05e12, 240e12, 130e9, 5e-6, 1e-6, 0.25, _TPU),
        Hardware("v5e", 16e9, 0.71e12, 170e12, 100e9, 5e-6, 1e-6, 0.25, _TPU, _ON_CHIP),
        Hardware("v5p", 95e9, 2.4e12, 400e12, 300e9, 5e-6, 1e-6, 0.25, _TPU),
        Hardware("v6e", 32e9, 1.4e12, 800e12, 180e9, 5e-6, 1e-6, 0.25, _TPU, _ON_CHIP),
        Hardware("cpu", 16e9, 20e9, 100e9, 5e9, 50e-6, 5e-6, 0.5, "two cores of an EPYC server, measured"),
    )
}


def find(name: str) -> Hardware:
    """The entry called `name`; ConfigError naming those there are."""
    if name not in HARDWARE:
        raise ConfigError(f"--hardware={name} is not known; choose one of {', '.join(HARDWARE)}, or --calibrate")
    return HARDWARE[name]


def at_hand(device_kind: str, platform: str, num_devices: int = 1) -> Hardware:
    """The entry of a device as JAX describes it; where none fits that of the CPU, which `num_devices` share."""
    kind = device_kind.lower().replace(" ", "").replace("lite", "e")
    for name in ("h200", "h100", "a100", "v6e", "v5p", "v5e", "v4"):
        if name in kind and platform != "cpu":
            return HARDWARE[name]
    cpu = HARDWARE["cpu"]
    shared = {name: getattr(cpu, name) / num_devices for name in ("memory_rate", "flops", "link_rate")}
    return dataclasses.replace(cpu, launch=cpu.launch * num_devices, latency=cpu.latency * num_devices, **shared)
