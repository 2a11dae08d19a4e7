"""What compare_peers.py measured, for people: the table with its goals, and the picture."""

import pathlib
from typing import Any

import numpy as np

SIDES = {
    "ours": "dlrm_jax",
    "torch": "PyTorch",
    "torch_compiled": "torch.compile",
    "torchrec": "TorchRec, FBGEMM",
    "dense_jax": "JAX, dense tables",
}
PEERS = tuple(side for side in SIDES if side != "ours")
BOUNDED = ("torch", "torchrec", "dense_jax")
"""Those whose floor is shown; that of compiled PyTorch is eager's."""

GOALS = {
    "cpu": {
        ("kaggle_b2048", "sgd", "torch"): 1.3,
        ("kaggle_b2048", "rowwise_adagrad", "torch"): 1.5,
        ("kaggle_b2048", "forward", "torch"): 1.2,
        ("kaggle_b128", "sgd", "torch"): 2.8,
        ("synthetic", "sgd", "torch"): 2.0,
        ("rm1", "sgd", "torch"): 2.0,
        ("rm2", "sgd", "torch"): 2.0,
        ("kaggle_b2048", "sgd", "dense_jax"): 25.0,
        ("kaggle_b2048", "rowwise_adagrad", "dense_jax"): 25.0,
    },
    "gpu": {
        (name, "sgd", side): ratio
        for name in ("kaggle_b2048", "kaggle_b32768", "terabyte_b65536")
        for side, ratio in (("torch", 3.0), ("torch_compiled", 1.5))
    },
}
"""How many times as fast as a peer we mean to be, on two CPU cores and on a GPU."""


def rows_of(taken: dict[str, list[float]], goals: dict[str, float]) -> dict[str, dict[str, Any]]:
    """By peer, of seconds measured in turns: medians and quartiles, how many times as fast ours is, goal.

    Where a side is called "floor", also how many times as fast that is.
    """
    medians = {side: 1e3 * float(np.median(times)) for side, times in taken.items()}
    quartiles = {side: [1e3 * float(q) for q in np.quantile(times, (0.25, 0.75))] for side, times in taken.items()}
    rows: dict[str, dict[str, Any]] = {}
    for side in taken.keys() & SIDES.keys() - {"ours"}:
        rows[side] = {
            "ours_ms": medians["ours"],
            "peer_ms": medians[side],
            "ratio": medians[side] / medians["ours"],
            "ours_quartiles_ms": quartiles["ours"],
            "peer_quartiles_ms": quartiles[side],
        }
        if "floor" in medians:
            rows[side] |= {"floor_ms": medians["floor"], "most_ratio": medians[side] / medians["floor"]}
        if side in goals:
            rows[side]["goal"] = goals[side]
    return rows


def table(results: dict[str, dict]) -> str:
    """Markdown, a row a configuration and optimizer."""
    lines = ["| configuration | step | ours | " + " | ".join(f"{SIDES[side]} | over ours" for side in PEERS) + " |"]
    lines.append("|---" * (3 + 2 * len(PEERS)) + "|")
    for name, kinds in results.items():
        for kind, row in kinds.items():
            if not row:
                continue  # No peer fitted into the memory.
            first = next(iter(row.values()))
            cells = [name, kind.replace("_", "-"), f"{first['ours_ms']:.2f} ms"]
            for side in PEERS:
                cells += [f"{row[side]['peer_ms']:.1f} ms", _ratio(row[side])] if side in row else ["-", "-"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    text = f"**{row['ratio']:.2f}x**"
    if "goal" in row:
        text += f"; {row['goal']}x {'met' if row['ratio'] >= row['goal'] else 'missed'}"
    return text


def floor_table(results: dict[str, dict]) -> str:
    """Markdown: the floor of floor.py, and how many times as fast as a peer it is."""
    over = " | ".join(f"{SIDES[side]} over it" for side in BOUNDED)
    lines = [f"| configuration | step | floor | ours over it | {over} |", "|---" * (4 + len(BOUNDED)) + "|"]
    for name, kinds in results.items():
        for kind, row in kinds.items():
            bounded = {side: row[side] for side in BOUNDED if "floor_ms" in row.get(side, {})}
            if not bounded:
                continue
            first = next(iter(bounded.values()))
            ours = f"{first['ours_ms'] / first['floor_ms']:.2f}"
            cells = [name, kind.replace("_", "-"), f"{first['floor_ms']:.1f} ms", ours]
            cells += [_most(bounded[side]) if side in bounded else "-" for side in BOUNDED]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _most(row: dict[str, Any]) -> str:
    return f"**{row['most_ratio']:.2f}**" + (f" (goal {row['goal']})" if "goal" in row else "")


def draw(results: dict[str, dict], path: pathlib.Path) -> None:
    """How many times as fast as each peer, a group of bars a configuration."""
    from matplotlib.figure import Figure

    names = [f"{name} {kind}" for name, kinds in results.items() for kind in kinds]
    rows = [row for kinds in results.values() for row in kinds.values()]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(PEERS)
    for i, side in enumerate(PEERS):
        places = np.arange(len(rows)) + (i - (len(PEERS) - 1) / 2) * width
        ratios = [row[side]["ratio"] if side in row else np.nan for row in rows]
        bars = axis.bar(places, ratios, width, label=SIDES[side])
        labels = ["" if np.isnan(r) else f"{r:.0f}" if r >= 10 else f"{r:.2g}" for r in ratios]
        axis.bar_label(bars, labels, label_type="center", rotation=90, fontsize=7, color="white")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xticks(np.arange(len(rows)), names, fontsize=7, rotation=30, ha="right")
    axis.set_ylabel("their step time over ours")
    axis.legend()
    figure.savefig(path, dpi=120)
