"""Published recipes on the data at hand, beside the numbers that were published for them.

`python experiments/published_quality.py --frappe=DIR --movielens=DIR`: Frappe's holds train.csv, valid.csv, test.csv.
Trains the flag files of RECIPES with `--num_seeds` each, and the first with one part of its recipe left out at a time;
writes two tables of experiments/README.md and published_quality.png. Finished runs are kept in --results, where the
same command goes on; rows of runs that are neither there nor asked for stay in the tables as they are, with their date.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

from measure import ROOT, replace_section, where_and_when

from dlrm_jax.training.reporting import read_metrics, versions
from dlrm_jax.training.seeds import summary

RECIPES: dict[str, tuple[int, str, str]] = {
    "frappe_dlrm": (202_812, "0.98400", "0.14444"),
    "frappe_dcnv2": (202_812, "0.98448", "0.14915"),
    "movielens_100k_adam": (80_000, "-", "-"),
}
"""Flag file: training rows, published test AUC and log loss (github.com/reczoo/BARS)."""
WITHOUT: dict[str, dict[str, str]] = {
    "the whole recipe": {},
    "L2 of touched rows only, as rows move that were touched": {"table_update": "touched"},
    "no L2": {"table_l2": "0"},
    "no dropout": {"dropout": "0"},
    "no batch norm": {"norm": "none"},
    "no cut of the rate": {"lr_plateau": ""},
    "no bound of the gradient's norm": {"clip_norm": "0"},
    "the package's initial weights": {"table_init": "dlrm", "dense_init": "dlrm"},
    "tables in bfloat16": {"table_dtype": "bfloat16"},
    "row-wise Adagrad for tables, rate 0.02": {"table_optimizer": "rowwise_adagrad", "table_rate": "20"},
}
FITTED = "logits times the one number that fits val"
"""The flag file itself: the others keep the logits as they were trained."""


HEADS = {
    "published": "| flag file | seeds | test AUC, mean (range) | published | log loss, mean | published | an epoch |",
    "ablation": "| DLRM on Frappe | seeds | val AUC | test AUC | to the whole | test log loss | steps |",
}


def prepare(frappe: pathlib.Path, results: pathlib.Path) -> pathlib.Path:
    """Frappe by its schema."""
    output = results / "data"
    if not (output / "schema.json").exists():
        files = ",".join(str(frappe / f"{name}.csv") for name in ("train", "valid", "test"))
        command = ["-m", "dlrm_jax.prepare", "--schema=frappe_x1", f"--input={files}", f"--output={output}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return output


def train(flagfile: str, data: pathlib.Path, workdir: pathlib.Path, num_seeds: int, changes: dict[str, str]) -> dict:
    """What `seeds.json` says of a flag file with some flags changed; of one seed too."""
    one = num_seeds == 1
    flags = {
        "data_dir": str(data),
        "log_every": "50",
        "workdir": str(workdir / "seed-0" if one else workdir),
        **changes,
    }
    flags |= {} if one else {"num_seeds": str(num_seeds)}
    command = [sys.executable, "-m", "dlrm_jax.train", f"--flagfile=experiments/{flagfile}.flags"]
    subprocess.run([*command, *(f"--{name}={value}" for name, value in flags.items())], cwd=ROOT, check=True)
    path = workdir / "seeds.json"
    if one:
        runs = {"0": json.loads((workdir / "seed-0" / "result.json").read_text())}
        path.write_text(json.dumps({"runs": runs, "summary": summary(runs)}))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def seconds_an_epoch(workdir: pathlib.Path, num_rows: int) -> float:
    """Of training alone, without evaluation and compilation: the median seed's."""
    rates = [json.loads(path.read_text())["samples_per_second"] for path in workdir.glob("seed-*/result.json")]
    return num_rows / sorted(rates)[len(rates) // 2]


def kept_rows(path: pathlib.Path, section: str) -> dict[str, str]:
    """The rows of a table of experiments/README.md, by what stands first in each."""
    text = path.read_text().partition(f"<!-- {section} -->")[2].partition(f"<!-- /{section} -->")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def table(head: str, rows: dict[str, str], kept: dict[str, str], order: list[str]) -> str:
    """Markdown: in this order the rows that there are, and of the others those that were kept."""
    every = kept | rows
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *(every[name] for name in order if name in every)])


def stamp_of(path: pathlib.Path, section: str, rows: dict[str, str], kept: dict[str, str], stamp: str) -> str:
    """When a table was measured: where rows were kept their own stamp stays, and the new one names its rows."""
    if not kept.keys() - rows.keys():
        return stamp
    before = path.read_text().partition(f"<!-- {section} -->")[2].partition(f"<!-- /{section} -->")[0]
    old = next(line for line in before.splitlines() if line.startswith("Measured"))
    return f"{old}\n\nOf these, {'; '.join(rows)}: {stamp[0].lower()}{stamp[1:]}"


def recipe_rows(rows: dict[str, tuple[dict, float]]) -> dict[str, str]:
    """By flag file."""
    lines = {}
    for name, (written, seconds) in rows.items():
        auc, loss = (written["summary"]["test"][metric] for metric in ("auc", "log_loss"))
        spread = f"**{auc['mean']:.5f}** ({auc['minimum']:.5f} to {auc['maximum']:.5f})"
        lines[f"`{name}.flags`"] = (
            f"| `{name}.flags` | {len(written['runs'])} | {spread} | {RECIPES[name][1]} | "
            f"{loss['mean']:.5f} | {RECIPES[name][2]} | {seconds:.1f} s |"
        )
    return lines


def ablation_rows(rows: dict[str, dict], kept: dict[str, str]) -> dict[str, str]:
    """By change of the recipe; where the whole recipe is not among them, against its row among those kept."""
    lines, first = {}, next(iter(WITHOUT))
    whole = rows[first]["summary"]["test"]["auc"]["mean"] if first in rows else float(kept[first].split(" | ")[3])
    for name, written in rows.items():
        val, test = written["summary"]["val"], written["summary"]["test"]
        steps = sum(run["step"] for run in written["runs"].values()) // len(written["runs"])
        lines[name] = (
            f"| {name} | {len(written['runs'])} | {val['auc']['mean']:.5f} | {test['auc']['mean']:.5f} | "
            f"{test['auc']['mean'] - whole:+.5f} | {test['log_loss']['mean']:.5f} | {steps} |"
        )
    return lines


def draw(workdirs: dict[str, pathlib.Path], path: pathlib.Path) -> None:
    """Validation AUC by step of each run's first seed, and where the whole recipe cut its rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, workdir in workdirs.items():
        lines = read_metrics(workdir / "seed-0")
        points = [(line["step"], line["auc"]) for line in lines if line["split"] == "val"]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    rates = [line for line in read_metrics(next(iter(workdirs.values())) / "seed-0") if line["split"] == "train"]
    for before, after in itertools.pairwise(rates):
        if after["learning_rate"] < before["learning_rate"]:
            axes.axvline(before["step"], color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel="validation AUC", ylim=(0.93, 0.988), title="DLRM on Frappe; dashed: a cut rate")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train what is not trained yet, then write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("frappe", "movielens"):
        parser.add_argument(f"--{name}", required=True, type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--results", default="runs/published", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--num_seeds", default=5, type=int)
    parser.add_argument(
        "--only", default="", help="train these flag files and changes, by name or number; default: all"
    )
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    data, only = prepare(given.frappe, given.results), set(filter(None, given.only.split(",")))
    command = "python experiments/published_quality.py --frappe=DIR --movielens=DIR"
    stamp = f"Measured {where_and_when(versions())}; `{command}`."
    readme = ROOT / "experiments" / "README.md"

    def trained(name: str, key: str, source: pathlib.Path, num_seeds: int, changes: dict[str, str]) -> dict | None:
        """What there is of `key` in --results, trained first where it is asked for."""
        workdir = given.results / key
        if not only or key in only:
            return train(name, source, workdir, num_seeds, changes)
        return json.loads((workdir / "seeds.json").read_text()) if (workdir / "seeds.json").exists() else None

    kept = {section: kept_rows(readme, section) for section in HEADS}

    def write(section: str, rows: dict[str, str], order: list[str]) -> None:
        said = stamp_of(readme, section, rows, kept[section], stamp)
        replace_section(readme, section, f"{table(HEADS[section], rows, kept[section], order)}\n\n{said}")

    recipes: dict[str, tuple[dict, float]] = {}
    for name, (num_rows, *_) in RECIPES.items():
        source = data if name.startswith("frappe") else given.movielens
        if written := trained(name, name, source, given.num_seeds, {}):
            recipes[name] = written, seconds_an_epoch(given.results / name, num_rows)
            write("published", recipe_rows(recipes), [f"`{known}.flags`" for known in RECIPES])
    workdirs, ablation = {}, {}
    if "frappe_dlrm" in recipes:
        ablation[FITTED] = recipes["frappe_dlrm"][0]
    for number, (name, changes) in enumerate(WITHOUT.items()):
        key, changes = f"without_{number}", {"fit_temperature": "false", **changes}
        if written := trained("frappe_dlrm", key, data, 1 if number else given.num_seeds, changes):
            workdirs[name], ablation[name] = given.results / key, written
    if ablation:
        write("ablation", ablation_rows(ablation, kept["ablation"]), [*WITHOUT, FITTED])
    shown = ("the whole recipe", "no L2", "no dropout", "no batch norm", "no cut of the rate")
    if set(shown) <= set(workdirs):  # Else the picture that is there shows more.
        draw({name: workdirs[name] for name in shown}, ROOT / "experiments" / "published_quality.png")


if __name__ == "__main__":
    main()
