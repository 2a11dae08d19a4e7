"""Tests `dlrm_jax/data/generate/synthetic.py`, `power_law.py` and `trace.py`."""

import bisect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.generate import trace
from dlrm_jax.data.generate.power_law import _below, draw, law_of, segments
from dlrm_jax.data.generate.synthetic import Log, Spec, device_batch, generate
from dlrm_jax.data.generate.trace import Distribution, read_distribution
from dlrm_jax.data.read.windows import made_by_host
from tests.batches import eval_batches


def ids_of(spec: Spec, seed: int, draws: int) -> np.ndarray:
    """So many ids of the first feature's bags, by the device."""
    made = jax.jit(lambda: device_batch(spec, seed, draws // spec.bag_sizes[0]))()
    return np.asarray(made.ids_BxK[:, : spec.bag_sizes[0]]).ravel()


@pytest.mark.parametrize("skew", [0.0, 0.8, 1.0, 1.3])
def test_ids_follow_the_power_law(skew):
    rows, draws = 500, 2**19
    ids = ids_of(Spec(1, (rows, 9), (64,), skew), 0, draws)
    counts, expected = np.bincount(ids, minlength=rows), np.diff(cumulative(rows, skew)) * draws
    np.testing.assert_allclose(counts, expected, atol=6 * expected.max() ** 0.5)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (rows - 1)) < 6 * (2 * rows) ** 0.5
    assert ids.min() == 0 and ids.max() == rows - 1


def cumulative(rows: int, skew: float) -> list[float]:
    """Integral of x^-skew from 1 to k + 1, over the whole."""
    bounds = np.arange(1, rows + 2.0)
    area = np.log(bounds) if skew == 1 else (bounds ** (1 - skew) - 1) / (1 - skew)
    return (area / area[-1]).tolist()


def test_a_log_is_a_function_of_its_seed_and_takes_no_memory():
    spec = Spec(3, (50, 1, 10_000), (2, 1, 5))
    first, again, other = generate(spec, 1, 10**12), generate(spec, 1, 10**12), generate(spec, 2, 10**12)
    batches = [next(eval_batches(log.splits["train"], 1000)) for log in (first, again, other)]
    jax.tree.map(np.testing.assert_array_equal, batches[0], batches[1])
    assert (batches[0].ids_BxK != batches[2].ids_BxK).any()
    assert batches[0].ids_BxK.shape == (1000, 8) and batches[0].dense_BxN.shape == (1000, 3)
    assert (batches[0].ids_BxK[:, 2] == 0).all(), "a table of one row"
    assert 0.2 < batches[0].label_B.mean() < 0.3
    assert len(first.splits["train"]) == 8 * 10**11 and first.fingerprint() != other.fingerprint()


def test_a_row_has_the_same_bits_wherever_it_is_made():
    """By the host and on a device; of rows of any number, beyond 2^32 too; of tables of 2^31 - 1 rows and of one."""
    log = Log(Spec(3, (2**31 - 1, 1, 10_000), (2, 1, 5), 0.0), 1)
    position = np.random.default_rng(0).integers(0, 2**32, 300, np.uint32)
    for first in (0, 2**32 - 5, 8 * 10**11):
        here, there = log(np, position, first), jax.jit(lambda rows, first=first: log(jnp, rows, first))(position)
        for ours, theirs in zip(here, there, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    behind, across = log(np, np.arange(5), 2**32), log(np, np.arange(10), 2**32 - 5)
    np.testing.assert_array_equal(behind[1], across[1][5:])
    assert (log(np, np.arange(5))[1] != behind[1]).any()


def test_a_split_is_made_as_it_is_read():
    """Each at its place in the log: the test split begins in the middle of a block."""
    log = generate(Spec(2, (50, 7)), 3, 100_000)
    whole = Log(Spec(2, (50, 7)), 3)(np, np.arange(100_000))
    for name, first, stop in (("train", 0, 80_000), ("val", 80_000, 90_000), ("test", 90_000, 100_000)):
        split, rows = log.splits[name], log.splits[name].whole()
        made = made_by_host(split.maker, np.arange(stop - first))
        for column, read, all_rows in zip(made, (rows.dense_RxN, rows.ids_RxK, rows.label_R), whole, strict=True):
            np.testing.assert_array_equal(column, all_rows[first:stop])
            np.testing.assert_array_equal(read, all_rows[first:stop])
        np.testing.assert_array_equal(rows.row_R, np.arange(first, stop))


def test_no_column_of_a_row_tells_of_another_nor_a_row_of_the_next():
    rows = 2**16
    dense, _, label = Log(Spec(24, (5,)), 0)(np, np.arange(rows))
    assert (dense * 2**24 == np.floor(dense * 2**24)).all() and dense.min() >= 0 and dense.max() < 1
    spread = np.column_stack([dense - 0.5, (dense * 256) % 1 - 0.5, label[:, None] - label.mean()])
    spread = spread / spread.std(axis=0)
    beside, next_row = spread.T @ spread / rows - np.eye(49), spread[1:].T @ spread[:-1] / rows
    assert max(np.abs(beside).max(), np.abs(next_row).max()) < 6 * rows**-0.5
    np.testing.assert_allclose(dense.mean(axis=0), 0.5, atol=6 * rows**-0.5)


@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0, 1.05])
@pytest.mark.parametrize("rows", [40_000_000, 2**31 - 1])
@pytest.mark.sample(3)
def test_on_device_ids_reach_every_row_of_a_large_table(rows, skew):
    """float32 has 24 bits: beyond 2^24 it holds even ids only, and a uniform one has 2^23 values."""
    draws = 2**20
    ids = ids_of(Spec(1, (rows,), (64,), skew), 3, draws)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < rows
    bounds = np.unique(np.geomspace(1, rows, 200).astype(np.int64)) if skew else np.linspace(0, rows, 200)
    bounds[0], bounds[-1] = 0, rows
    counts, _ = np.histogram(ids, bounds)
    expected = np.diff(law(bounds, rows, skew)) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    assert abs(chi_square - degrees) < 6 * (2 * degrees) ** 0.5
    high = ids[ids >= 2**24]
    assert abs((high % 2).mean() - 0.5) < 5 * 0.5 / len(high) ** 0.5
    residues = np.bincount(high % 64, minlength=64)
    assert ((residues - len(high) / 64) ** 2 / (len(high) / 64)).sum() < 63 + 6 * 126**0.5
    if not skew:
        distinct = rows * -np.expm1(draws * np.log1p(-1 / rows))
        assert abs(len(np.unique(ids)) - distinct) < 6 * (draws**2 / 2 / rows) ** 0.5 + 1


def law(bounds: np.ndarray, rows: int, skew: float) -> np.ndarray:
    """P(id < bound), as the host has it."""
    x, top = bounds + 1.0, rows + 1.0
    return np.log(x) / np.log(top) if skew == 1 else (x ** (1 - skew) - 1) / (top ** (1 - skew) - 1)


def test_a_segment_holds_ranks_that_are_nearly_as_likely():
    for rows, skew in ((1, 1.05), (5, 0.0), (1000, 3.0), (2**31 - 1, 0.0), (2**31 - 1, 0.01), (2**31 - 1, 1.3)):
        first, below = segments(rows, skew)
        assert first[0] == 0 and first[-1] == rows and len(below) == len(first) - 2
        widths = np.diff(first.astype(np.int64))
        assert (widths > 0).all() and (np.diff(below.astype(np.int64)) >= 0).all()
        wide = widths > 1
        fall = ((first[1:] + 0.0) / (first[:-1] + 1.0)) ** skew
        assert (fall[wide] <= 1 + 2**-8 + 1e-9).all()


def test_a_rank_of_a_wide_segment_is_drawn_by_more_than_32_bits():
    """Else some of two thousand million would be half as likely again as others; of a thousand none is by much."""
    choice, place = np.arange(2**32 - 64, 2**32, dtype=np.uint32)[:, None], np.full((64, 1), 2**30, np.uint32)
    drawn = [draw(np, law_of(np.array([rows]), 0.0), choice, place).ravel() for rows in (2**31 - 1, 1000)]
    assert sorted(set(drawn[0].tolist())) == [2**29 - 1, 2**29] and set(drawn[1].tolist()) == {250}


def test_words_are_scaled_as_whole_numbers_are():
    rng = np.random.default_rng(0)
    high, low, bound = rng.integers(0, 2**32, (3, 1000), np.uint64)
    high[:4], low[:4], bound[:4] = 2**32 - 1, 2**32 - 1, [1, 2, 2**31, 2**32 - 1]
    got = _below(*(words.astype(np.uint32) for words in (high, low, bound)))
    words = zip(high.tolist(), low.tolist(), bound.tolist(), strict=True)
    assert got.tolist() == [(h * 2**32 + rest) * most >> 64 for h, rest, most in words]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"table_sizes": ()}, "table_sizes"),
        ({"table_sizes": (0,)}, "table_sizes"),
        ({"hotness": (1, 2, 3)}, "3 numbers for 2 tables"),
        ({"hotness": (0,)}, "hotness"),
        ({"num_dense": -1}, "num_dense"),
        ({"id_skew": -1.0}, "id_skew"),
    ],
)
def test_specs_that_cannot_be(fields, words):
    with pytest.raises(ConfigError, match=words):
        Spec(**({"num_dense": 1, "table_sizes": (5, 5)} | fields))


def profile(ids: np.ndarray) -> Distribution:
    """The distribution of a trace, as the reference's trace_profile finds it."""
    stack, distances, accesses = [], [], []
    for i in ids.tolist():
        if i in stack:
            distances.append(len(stack) - stack.index(i))
            stack.remove(i)
        else:
            distances.append(0)
            accesses.append(i)
        stack.append(i)
    values, counts = np.unique(distances, return_counts=True)
    return Distribution(tuple(accesses), tuple(values.tolist()), tuple((np.cumsum(counts) / len(ids)).tolist()))


def plain_generate(accesses, list_sd, cumm_sd, length, rng) -> list[int]:
    """The reference's trace_generate_lru, number for number."""
    accesses, out, i = list(accesses), [], 0
    size = len(accesses)
    for u in rng.random(length):
        if i < list_sd[-1]:
            u = u * cumm_sd[bisect.bisect(list_sd, i) - 1]
        sd = next(list_sd[j] for j, f in enumerate(cumm_sd) if u <= f)
        if sd == 0:
            ref = accesses.pop(0)
            i += 1
        else:
            ref = accesses.pop(size - sd)
        accesses.append(ref)
        out.append(ref)
    return out


def test_generation_equals_the_plain_one():
    found = profile(np.random.default_rng(0).zipf(1.4, 800) % 60)
    ours = trace.generate(found, 3000, np.random.default_rng(5))
    np.testing.assert_array_equal(ours, plain_generate(*vars(found).values(), 3000, np.random.default_rng(5)))


def test_a_generated_trace_has_the_reuse_it_was_asked_for():
    ids = np.random.default_rng(1).zipf(1.5, 20_000) % 40
    wanted = profile(ids)
    got = profile(trace.generate(wanted, 20_000, np.random.default_rng(2)))
    theirs = dict(zip(got.distances, got.cumulative, strict=True))
    for distance in (1, 2, 5, 10):
        assert theirs[distance] == pytest.approx(
            dict(zip(wanted.distances, wanted.cumulative, strict=True))[distance], abs=0.08
        )  # The reference's generator is no nearer: it starts from a stack that nothing has used yet.


def test_files_of_the_reference_are_read(tmp_path):
    path = str(tmp_path / "dist_emb_0.log")
    (tmp_path / "dist_emb_0.log").write_text("3, 1, 2\n0, 1, 3\n0.25, 0.75, 1.0\n")
    assert read_distribution(path) == Distribution((3, 1, 2), (0, 1, 3), (0.25, 0.75, 1.0))
    spec = Spec(1, (4,), (2,), id_trace=str(tmp_path / "dist_emb_{}.log"))
    batch = next(eval_batches(generate(spec, 0, 1000).splits["train"], 500))
    assert set(batch.ids_BxK.ravel().tolist()) == {1, 2, 3}
    with pytest.raises(ConfigError, match="has id 3, outside a table of 3 rows"):
        generate(Spec(1, (3,), (2,), id_trace=str(tmp_path / "dist_emb_{}.log")), 0, 1000)
    with pytest.raises(ConfigError, match="made on the host only"):
        device_batch(spec, 0, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1, 2\n0, 1\n", "has 2 lines"),
        ("1, 2\n0, 1\n0.5\n", "2 distances but 1 prob"),
        ("1, 2\n1, 0\n0.5, 1.0\n", "must ascend"),
        ("1, 2\n0, 3\n0.5, 1.0\n", "distance 3 is beyond its 2 ids"),
        ("1, 1\n0, 1\n0.5, 1.0\n", "stands twice"),
        ("a, 1\n0, 1\n0.5, 1.0\n", "line 1: not numbers"),
    ],
)
def test_bad_distribution_files(tmp_path, text, words):
    (tmp_path / "dist.log").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_distribution(str(tmp_path / "dist.log"))
