"""Tests `dlrm_jax/data/generate/multi_hot.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import EMPTY_SLOT, ConfigError, FeatureConfig
from dlrm_jax.data.generate.multi_hot import DISTRIBUTIONS, compatible_tables, expand_dataset, virtual_ids
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.data.read.pipeline import Cut
from dlrm_jax.training.feed import Feed

ROWS, SIZES = (7, 1000, 1), (3, 1, 4)


def one_hot(num_rows: int = 50) -> Dataset:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(0, rows, num_rows) for rows in ROWS], axis=1).astype(np.int32)
    ids[3, 1] = EMPTY_SLOT
    split = Split(np.ones((num_rows, 1), np.float32), ids, np.zeros(num_rows, np.float32), np.arange(num_rows))
    features = tuple(FeatureConfig(name, name) for name in "abc")
    return Dataset(
        "log", ("x",), features, dict(zip("abc", ROWS, strict=True)), dict.fromkeys(("train", "val", "test"), split)
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_compatible_tables_are_the_references(distribution):
    """As the issue of MLPerf's data states it: one seed, feature by feature."""
    np.random.seed(0)  # noqa: NPY002 - the reference's own generator
    for rows, hotness, ours in zip(ROWS, SIZES, compatible_tables(ROWS, SIZES, distribution), strict=True):
        if distribution == "uniform":
            theirs = np.random.randint(0, rows, size=(rows, hotness - 1))  # noqa: NPY002
        else:
            with np.errstate(invalid="ignore"):
                theirs = np.random.pareto(a=0.25, size=(rows, hotness - 1)).astype(np.int32) % rows  # noqa: NPY002
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("virtual", [True, False])
def test_a_bag_is_its_id_and_then_always_the_same(virtual, resident):
    dataset = expand_dataset(one_hot(), SIZES, "uniform", virtual)
    assert [feature.hotness for feature in dataset.features] == list(SIZES)
    feed = Feed(dataset.splits["train"], Cut(16, 2), expander=dataset.expander, resident=resident)
    with feed.eval_windows() as windows:
        batches = [jax.jit(feed.batch)(window, i) for _, window in windows for i in range(2)]
    ids = np.concatenate([np.asarray(batch.ids_BxK) for batch in batches])[:50]
    plain = one_hot().splits["train"].ids_RxK
    np.testing.assert_array_equal(ids[:, [0, 3, 4]], plain)
    assert ids.shape == (50, 8) and ids[3, 3] == EMPTY_SLOT
    for start, size, rows in ((0, 3, 7), (4, 4, 1)):
        bags = {}
        for bag in ids[:, start : start + size].tolist():
            assert bags.setdefault(bag[0], bag) == bag and all(0 <= i < rows for i in bag)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rows", [1, 3, 1000, 40_000_000])
def test_virtual_bags_are_bit_equal_on_host_and_device(distribution, rows):
    ids = np.concatenate([np.arange(-1, min(rows, 5000)), [rows - 1]]).astype(np.int32)
    for feature in (0, 25):
        host = virtual_ids(np, ids, feature, rows, 9, distribution)
        device = jax.jit(lambda x, f=feature: virtual_ids(jnp, x, f, rows, 9, distribution))(ids)
        np.testing.assert_array_equal(host, device)
        assert host.dtype == np.int32 and (host[1:] >= 0).all() and (host < rows).all()
        assert (host[0] == EMPTY_SLOT).all(), "no id, no bag"
    other = virtual_ids(np, ids, 24, rows, 9, distribution)
    assert rows == 1 or (host[:, 1:] != other[:, 1:]).any(), "features draw apart"


def test_virtual_laws():
    ids = np.arange(200_000, dtype=np.int32)
    uniform = virtual_ids(np, ids, 3, 1000, 3, "uniform")[:, 1:]
    counts = np.bincount(uniform.ravel(), minlength=1000)
    assert abs(counts - 400).max() < 6 * 400**0.5
    pareto = virtual_ids(np, ids, 3, 10_000_000, 3, "pareto")[:, 1:].ravel()
    # P(X < x) = 1 - (1 + x)^-0.25, as numpy.random.pareto(0.25)
    for x in (1, 10, 1000):
        assert (pareto < x).mean() == pytest.approx(1 - (1 + x) ** -0.25, abs=0.02)
    assert len({tuple(row) for row in virtual_ids(np, ids[:100], 0, 10**6, 5, "uniform").tolist()}) == 100


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((1, 2), "2 numbers, but log has 3 features"), ((1, 0, 1), "at least its own id")],
)
def test_bad_sizes(sizes, words):
    with pytest.raises(ConfigError, match=words):
        expand_dataset(one_hot(), sizes, "uniform", True)


def test_bags_of_bags_are_refused():
    once = expand_dataset(one_hot(), SIZES, "uniform", True)
    with pytest.raises(ConfigError, match="a of log is a bag already"):
        expand_dataset(once, SIZES, "uniform", True)
    assert (
        len({expand_dataset(one_hot(), SIZES, d, v).fingerprint() for d in DISTRIBUTIONS for v in (True, False)}) == 4
    )
