"""A small shop's click log as a CSV, to try things out with: `python experiments/shop_log.py logs/shop.csv`.

Each user, item, category and hour has a bias, the price a slope, and a click is a coin flip with the probability of
their sum: logistic regression is the right model for it, and hard to beat. Needs NumPy alone.
"""

import argparse
import pathlib

import numpy as np

ROWS = 30_000
SIZES = {"user": 1500, "item": 400, "category": 12, "hour": 24}


def write(path: pathlib.Path, rows: int = ROWS, seed: int = 0) -> None:
    """Write the log, and the folder it is in."""
    rng = np.random.default_rng(seed)
    category_of_item = rng.integers(0, SIZES["category"], SIZES["item"])
    price_of_item = np.exp(rng.normal(3, 0.8, SIZES["item"]))
    bias = {name: rng.normal(0, 0.7, size) for name, size in SIZES.items()}
    # A few users and items are far more frequent than the others.
    ids = {name: np.minimum(rng.zipf(1.3, rows) - 1, 10**9) % SIZES[name] for name in ("user", "item")}
    ids |= {"category": category_of_item[ids["item"]], "hour": rng.integers(0, SIZES["hour"], rows)}
    price = price_of_item[ids["item"]] * np.exp(rng.normal(0, 0.2, rows))
    logit = -1 - 0.5 * (np.log(price) - 3) + sum(bias[name][ids[name]] for name in SIZES)
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        print("click,user,item,category,price,hour", file=file)
        for i in range(rows):
            user, item, category, hour = (ids[name][i] for name in SIZES)
            print(f"{int(click[i])},u{user},i{item},c{category},{price[i]:.2f},{hour}", file=file)


def main() -> None:
    """Write the log that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    flags = parser.parse_args()
    write(flags.path, flags.rows)


if __name__ == "__main__":
    main()
