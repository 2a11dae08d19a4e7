"""What columns become as features: ids by name and by their frequencies, counts, lists, embeddings."""

import numpy as np
import pytest

from dlrm_jax.data.infer.column import make_column
from dlrm_jax.data.infer.features import _is_called_id, _looks_like_ids, make_features

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


IDS = (
    "userId",
    "movieId",
    "user_id",
    "UserID",
    "itemid",
    "customer",
    "customerId",
    "Customer",
    "user",
    "item",
    "product_code",
    "movie",
    "session",
    "adId",
    "C14",
    "article_no",
    "sku",
    "shop",
    "zip",
    "hour_of_day",
    "device_type",
    "campaign",
    "viewed_item",
    "categoryIds",
)
NO_IDS = (
    "views",
    "num_users",
    "numItems",
    "item_count",
    "users_total",
    "price",
    "paid",
    "bid",
    "valid",
    "humid",
    "user_age",
    "itemPrice",
    "session_length",
    "page_views",
    "product_rating",
    "count_by_user",
    "nItems",
    "customers",
    "items",
    "id_count",
    "x",
)


@pytest.mark.parametrize("name", IDS)
def test_names_of_ids(name):
    assert _is_called_id(make_column(name, []).words)
    numbers = RNG.integers(10_000, 99_999, 1500).tolist()
    dense, sparse = make_features([make_column(name, numbers)], [])
    assert not dense and (len(sparse) == 1 or len(set(numbers)) > 0.95 * 1500)


@pytest.mark.parametrize("name", NO_IDS)
def test_names_of_quantities(name):
    assert not _is_called_id(make_column(name, []).words)
    numbers = (RNG.pareto(1, 1500) * 50).astype(int).tolist()
    dense, sparse = make_features([make_column(name, numbers)], [])
    assert [d.name for d in dense] == [name] and not sparse


def test_users_of_a_large_range_are_kept():
    numbers = RNG.integers(1, 90_000, 1500).tolist()
    for name in ("userId", "customer"):
        _, sparse = make_features([make_column(name, numbers)], [])
        assert [s.name for s in sparse] == [name]
    assert make_features([make_column("row_id", list(range(1500)))], []) == ([], [])


def zipf(rows: int, ids: int, power: float) -> np.ndarray:
    share = 1 / np.arange(1, ids + 1) ** power
    return RNG.choice(RNG.permutation(ids) + 1, rows, p=share / share.sum())


QUANTITIES = {
    "poisson": lambda n: RNG.poisson(60, n),
    "geometric": lambda n: RNG.geometric(0.01, n),
    "lognormal": lambda n: np.exp(RNG.normal(4, 1.5, n)).astype(int),
    "pareto": lambda n: (RNG.pareto(1, n) * 50).astype(int),
    "normal": lambda n: RNG.normal(500, 100, n).astype(int),
    "ages": lambda n: RNG.integers(18, 80, n),
    "minutes": lambda n: RNG.integers(0, 1440, n),
    "in thousands": lambda n: RNG.normal(50, 15, n).astype(int) * 1000,
    "ending in 99": lambda n: RNG.poisson(20, n) * 100 + 99,
    "often multiples of 30": lambda n: np.where(
        RNG.random(n) < 0.3, RNG.integers(1, 40, n) * 30, RNG.geometric(0.003, n)
    ),
    "two modes": lambda n: np.where(RNG.random(n) < 0.5, RNG.poisson(50, n), RNG.poisson(300, n)),
    "below zero": lambda n: RNG.integers(-900_000, 900_000, n),
}


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("rows", [1500, 30_000])
def test_quantities_do_not_look_like_ids(name, rows):
    assert not any(_looks_like_ids(QUANTITIES[name](rows).astype(float)) for _ in range(5))


@pytest.mark.parametrize(("ids", "power"), [(500, 0.8), (1000, 1.0), (3000, 1.2)])
def test_ids_look_like_ids(ids, power):
    assert all(_looks_like_ids(zipf(30_000, ids, power).astype(float)) for _ in range(5))
    assert _looks_like_ids(RNG.integers(10_000, 99_999, 30_000).astype(float)).startswith("spread evenly")
    column = make_column("column_3", zipf(30_000, ids, power).tolist())
    assert [s.name for s in make_features([column], [])[1]] == ["column_3"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[0.1, i / 7] for i in range(50)], "left out, lists of numbers with a fraction"),
        ([[1.0, float(i % 3)] for i in range(50)], "sparse, lists of up to 2 values"),
        ([["a", "0.5"][: i % 3] for i in range(50)], "sparse, lists of up to 2 values"),
        ([f"0.{i % 3}|0.{i % 7}" for i in range(50)], "left out, lists at '|' of numbers with a fraction"),
        ([f"{i % 3}|{i % 7}" for i in range(50)], "sparse, lists at '|' of up to 2 values"),
    ],
)
def test_lists_of_fractions_are_no_ids(values, words):
    reasons: list[str] = []
    dense, sparse = make_features([make_column("v", values)], reasons)
    assert reasons[0].startswith(f"v: {words}") and not dense and bool(sparse) == words.startswith("sparse")
