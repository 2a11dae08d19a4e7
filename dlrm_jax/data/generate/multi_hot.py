"""Bags made of one-hot ids, as MLPerf's DLRM-DCNv2 has them, without the 3.8 TB that they take on disk.

The bag of id i of a feature with n rows and hotness h is i followed by h - 1 drawn ids, always the same for i.

compatible: drawn as the reference does (torchrec_dlrm's Multihot): NumPy's legacy generator, seed 0, feature by
feature `randint(0, n, (n, h - 1))`, or `pareto(0.25, (n, h - 1)).astype(int32) % n`. The stream cannot be entered in
the middle, so the (n, h - 1) tables are held in memory.

virtual: slot s of id i of feature f is a hash of (f, i, s), so nothing is held. In 32-bit words, wrapping,
    mix(x) = murmur3's finaliser;  x = mix(mix(f * 0x9E3779B9 + s) ^ mix(i + 0x85EBCA6B))
    uniform: x mod n;  pareto: u = (x | 1) / 2^32, floor(u^-4) - 1, at most 2^30 - 1, mod n  (Pareto, a = 0.25)
"""

import dataclasses
from typing import Any

import numpy as np

from dlrm_jax.config import EMPTY_SLOT, ConfigError, FeatureConfig, require
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.model.hashing import mix

MULTI_HOT = ("none", "compatible", "virtual")
DISTRIBUTIONS = ("uniform", "pareto")
_GREATEST = 2**30


def compatible_tables(
    rows: tuple[int, ...], hotness: tuple[int, ...], distribution: str = "uniform"
) -> list[np.ndarray]:
    """For each feature the (n, h - 1) further ids of each id, int32; bit-equal to the reference's."""
    generator = np.random.RandomState(0)
    tables = []
    for n, h in zip(rows, hotness, strict=True):
        if distribution == "uniform":
            drawn = generator.randint(0, n, size=(n, h - 1))
        else:
            with np.errstate(invalid="ignore"):  # The law's tail is beyond int32; the reference casts it all the same.
                drawn = generator.pareto(a=0.25, size=(n, h - 1)).astype(np.int32) % n  # type: ignore[assignment]
        tables.append(drawn.astype(np.int32))
    return tables


def virtual_ids(xp: Any, ids_B: Any, feature: int, rows: int, hotness: int, distribution: str) -> Any:
    """(B, hotness) bag of each id, computed with `xp`: numpy, or jax.numpy on the device; an empty slot stays empty."""
    ids_Bx1 = ids_B[:, None]
    # One-element arrays, not scalars: NumPy warns where a scalar wraps.
    slot_1xh = xp.arange(1, hotness, dtype=xp.uint32)[None, :]
    of_slot = mix(slot_1xh + xp.full((1, 1), feature * 0x9E3779B9 & 0xFFFFFFFF, xp.uint32))
    of_id = mix(ids_Bx1.astype(xp.uint32) + xp.full((1, 1), 0x85EBCA6B, xp.uint32))
    x = mix(of_slot ^ of_id)
    if distribution == "pareto":
        # Only exactly rounded operations, so that every device has the same: u^-4 by one division and two products.
        inverse = xp.float32(2.0**32) / (x | xp.uint32(1)).astype(xp.float32)
        square = inverse * inverse
        power = xp.minimum(square * square, xp.float32(_GREATEST))
        x = power.astype(xp.uint32) - xp.full((1, 1), 1, xp.uint32)
    drawn = (x % xp.uint32(rows)).astype(xp.int32)
    bag_Bxh = xp.concatenate([ids_Bx1, drawn], axis=1)
    return xp.where(ids_Bx1 == EMPTY_SLOT, xp.int32(EMPTY_SLOT), bag_Bxh)


@dataclasses.dataclass(frozen=True)
class Expander:
    """One-hot ids (B, F) to bags (B, K). `tables` for the compatible form, None for the virtual one."""

    rows: tuple[int, ...]
    hotness: tuple[int, ...]
    distribution: str
    tables: tuple[np.ndarray, ...] | None = None

    @property
    def on_device(self) -> bool:
        """Whether bags are made on the device: then F ids a row travel there, not K."""
        return self.tables is None

    def on_host(self, ids_RxF: np.ndarray) -> np.ndarray:
        """The bags (R, K) of some rows, on the host."""
        if self.tables is None:
            return np.asarray(self.compute(np, ids_RxF))
        bags = []
        for f, table in enumerate(self.tables):
            ids_R = ids_RxF[:, f]
            bag = np.concatenate([ids_R[:, None], table[ids_R]], axis=1)
            bags.append(np.where(ids_R[:, None] == EMPTY_SLOT, np.int32(EMPTY_SLOT), bag))
        return np.concatenate(bags, axis=1)

    def compute(self, xp: Any, ids_RxF: Any) -> Any:
        """The virtual bags (R, K), with numpy or jax.numpy."""
        bags = [
            virtual_ids(xp, ids_RxF[:, f], f, n, h, self.distribution)
            for f, (n, h) in enumerate(zip(self.rows, self.hotness, strict=True))
        ]
        return xp.concatenate(bags, axis=1)


def expand_dataset(dataset: Dataset, sizes: tuple[int, ...], distribution: str, virtual: bool) -> Dataset:
    """`dataset` with bags of `sizes` ids; ConfigError unless its features are one-hot and as many as `sizes`."""
    require(
        len(sizes) == len(dataset.features),
        f"multi_hot_sizes has {len(sizes)} numbers, but {dataset.name} has {len(dataset.features)} features",
    )
    require(min(sizes) >= 1, f"multi_hot_sizes is {sizes}; a bag has at least its own id")
    hot = [feature.name for feature in dataset.features if feature.hotness > 1]
    if hot:
        raise ConfigError(f"multi_hot needs one-hot features, but {hot[0]} of {dataset.name} is a bag already")
    rows = tuple(dataset.table_sizes[feature.table] for feature in dataset.features)
    tables = None if virtual else tuple(compatible_tables(rows, sizes, distribution))
    features = tuple(
        FeatureConfig(feature.name, feature.table, hotness, feature.pooling)
        for feature, hotness in zip(dataset.features, sizes, strict=True)
    )
    return dataclasses.replace(
        dataset,
        features=features,
        expander=Expander(rows, sizes, distribution, tables),
        checksum=f"{dataset.fingerprint()}+{'virtual' if virtual else 'compatible'}-{distribution}",
    )
