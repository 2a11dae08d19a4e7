"""What the device at hand can do, measured in some seconds: the same constants as hardware.py's table."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.host.mesh import BATCH_SPEC, MODEL, MeshShape, make_mesh
from dlrm_jax.planning.hardware import Hardware, of_device

_STREAM_FLOATS = 2**24
_TABLE_ROWS, _ROW_FLOATS, _LOOKUPS = 2**20, 16, 2**17
_MATRIX = 1024


def calibrate() -> Hardware:
    """A Hardware entry of the first device, and of the links between all of them."""
    device = jax.devices()[0]
    known = of_device(device, len(jax.local_devices()))
    stream = jnp.ones(_STREAM_FLOATS)
    memory_rate = 8.0 * _STREAM_FLOATS / seconds(jax.jit(lambda x: x + 1), stream)
    matrix = jnp.ones((_MATRIX, _MATRIX))
    flops = 2.0 * _MATRIX**3 / seconds(jax.jit(lambda x: x @ x), matrix)
    table = jnp.ones((_TABLE_ROWS, _ROW_FLOATS))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, _TABLE_ROWS, _LOOKUPS), jnp.int32)
    gather = jax.jit(lambda t, i: t.at[i].get(mode="promise_in_bounds").sum(axis=0))
    row_rate = 4.0 * _LOOKUPS * _ROW_FLOATS / seconds(gather, table, ids)
    launch = seconds(jax.jit(lambda x: x + 1), jnp.ones(8))
    link_rate, latency = _links(known)
    return Hardware(
        name=f"{known.name} (calibrated)",
        memory_bytes=known.memory_bytes,
        memory_rate=memory_rate,
        flops=flops,
        link_rate=link_rate,
        latency=latency,
        launch=min(launch, known.launch),
        row_efficiency=min(1.0, row_rate / memory_rate),
        on_chip_bytes=known.on_chip_bytes,
        is_cpu=known.is_cpu,
        source=f"measured on {len(jax.devices())} x {device.device_kind}",
    )


def seconds(function: Callable[..., Any], *args: Any, repeats: int = 7) -> float:
    """Median time of a compiled function, after a first call."""
    jax.block_until_ready(function(*args))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def _links(known: Hardware) -> tuple[float, float]:
    """(bytes/s that a device sends in an all-to-all, seconds that an empty one takes); as known where there is one."""
    count = len(jax.devices())
    if count == 1:
        return known.link_rate, known.latency
    mesh = make_mesh(MeshShape(1, count))

    def all_to_all(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, MODEL, 0, 0, tiled=True)

    run = jax.jit(jax.shard_map(all_to_all, mesh=mesh, in_specs=BATCH_SPEC, out_specs=BATCH_SPEC, check_vma=False))
    sharding = jax.sharding.NamedSharding(mesh, BATCH_SPEC)
    small, large = (jax.device_put(jnp.ones((count * count, n)), sharding) for n in (2, 2**18))
    latency = seconds(run, small)
    sent = 4.0 * count * 2**18 * (1 - 1 / count)
    return sent / max(seconds(run, large) - latency, 1e-9), latency
