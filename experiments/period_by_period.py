"""Progressive validation on the drifting planted log and on MovieLens by weeks, as README's tables and a picture.

`python experiments/period_by_period.py --movielens=DIR`. Results are kept in --results, where the same command goes on.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from measure import ROOT, replace_section, where_and_when

from dlrm_jax.judging.by_period import shared

SHOWN = ("living", "frozen", "retrained", "optimum")


def run(name: str, workdir: pathlib.Path, *more: str) -> dict[str, Any]:
    """What online.json says of a flag file."""
    command = [sys.executable, "-m", "dlrm_jax.online", f"--flagfile=experiments/{name}.flags", f"--workdir={workdir}"]
    subprocess.run([*command, *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((workdir / "online.json").read_text())


def by_period(periods: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: AUC by period of all models, and what they are below the optimum."""
    lines = ["| period | optimum | living | below it | frozen | below it |", "|---|---|---|---|---|---|"]
    for period in periods:
        best, cells = period["optimum"]["auc"], []
        for model in ("living", "frozen"):
            auc = period.get(model, {}).get("auc")
            cells += ["", ""] if auc is None else [f"{auc:.4f}", f"{best - auc:.4f}"]
        lines.append(f"| {period['name'].removeprefix('period_')} | {best:.4f} | {' | '.join(cells)} |")
    return lines


def means(name: str, result: dict[str, Any]) -> list[str]:
    """Lines of Markdown: each model's means over the periods that all scored."""
    periods = shared(result["periods"])
    lines = []
    for model in [model for model in SHOWN if model in periods[0]]:
        values = {
            key: [period[model].get(key) for period in periods] for key in ("auc", "log_loss", "normalized_entropy")
        }
        cells = ["-" if None in of else f"{sum(of) / len(of):.4f}" for of in values.values()]
        lines.append(f"| {name}, {len(periods)} periods | {model} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run what is not there yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--movielens", required=True, type=lambda path: str(pathlib.Path(path).resolve()))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("runs/period_by_period"))
    flags = parser.parse_args()
    drift = run("planted_drift", flags.results / "drift", "--frozen_after=2")
    weeks = run(
        *("movielens_100k_week", flags.results / "weeks", "--frozen_after=4", "--retrain=3"),
        f"--data_dir={flags.movielens}",
    )
    head = ["| log | model | mean AUC | mean log loss | mean NE |", "|---|---|---|---|---|"]
    lines = by_period(drift["periods"])
    lines += ["", *head, *means("`planted_drift.flags`", drift), *means("`movielens_100k_week.flags`", weeks), ""]
    stamp = where_and_when(drift["versions"])
    lines.append(f"Measured {stamp}; `python experiments/period_by_period.py --movielens=DIR`.")
    replace_section(ROOT / "experiments" / "README.md", "period_by_period", "\n".join(lines))
    shutil.copy(flags.results / "drift" / "online.png", ROOT / "experiments" / "period_by_period.png")


if __name__ == "__main__":
    main()
