"""Run the flag files and write the results table of experiments/README.md.

`python experiments/measure.py --movielens=DIR --criteo=DIR [--skip_row_free]`. Tables are never typed by hand.
"""

import argparse
import datetime
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNS = (
    # flag file, data flag of this script, test AUC of the PyTorch reference on exactly this model
    ("quickstart", None, None),
    ("movielens_100k", "movielens", 0.782),
    ("movielens_100k_sgd", "movielens", 0.771),
    ("movielens_100k_time", "movielens", 0.707),
    ("movielens_100k_cross", "movielens", None),
    ("criteo_kaggle", "criteo", None),
)


def run(name: str, data_dir: str | None) -> dict:
    """Train with a flag file in a throw-away workdir; its result.json and the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "dlrm_jax.train", f"--flagfile=experiments/{name}.flags"]
        command += [f"--workdir={workdir}"] + ([f"--data_dir={data_dir}"] if data_dir else [])
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        return json.loads((pathlib.Path(workdir) / "result.json").read_text()) | {"seconds": seconds}


def results_table(rows: list[tuple[str, float | None, dict]]) -> str:
    """Markdown, a row a flag file."""
    lines = [
        "| flag file | test AUC | reference or optimum | log loss | NE | accuracy | step | samples/s | whole command |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, reference, result in rows:
        test, optimum = result["test"], result.get("optimum")
        beside = f"{reference:.3f} (reference)" if reference else f"{optimum['auc']:.4f} (optimum)" if optimum else "-"
        lines.append(
            f"| `{name}.flags` | **{test['auc']:.4f}** | {beside} | {test['log_loss']:.4f} | "
            f"{test['normalized_entropy']:.4f} | {test['accuracy']:.4f} | {result['step']} | "
            f"{result['samples_per_second']:,.0f} | {result['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def where_and_when(versions: dict) -> str:
    """Date, hardware and versions of a table."""
    packages = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    cores = subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout.strip()
    hardware = f"{cores} {platform.machine()} cores, {versions['device']}"
    return f"{datetime.date.today()}, {hardware}, Python {versions['python']}, {packages}"


def replace_section(path: pathlib.Path, name: str, text: str) -> None:
    """Put `text` between `<!-- name -->` and `<!-- /name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = path.read_text().split(start)
    path.write_text(before + start + "\n" + text + "\n" + end + rest.split(end)[1])


def main() -> None:
    """Run everything and rewrite the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("movielens", "criteo"):
        parser.add_argument(f"--{name}", required=True, type=lambda path: str(pathlib.Path(path).resolve()))
    parser.add_argument("--skip_row_free", action="store_true", help="leave the row-free section as it is")
    flags = parser.parse_args()
    rows = [(name, reference, run(name, data and getattr(flags, data))) for name, data, reference in RUNS]
    stamp = where_and_when(rows[0][2]["versions"])
    table = f"{results_table(rows)}\n\nMeasured {stamp}; `python experiments/measure.py --movielens=DIR --criteo=DIR`."
    replace_section(ROOT / "experiments" / "README.md", "results", table)
    if not flags.skip_row_free:
        command = [sys.executable, "experiments/row_free.py"]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        text = f"```\n{output}```\n\nMeasured {stamp}; `python experiments/row_free.py`."
        replace_section(ROOT / "experiments" / "README.md", "row_free", text)


if __name__ == "__main__":
    main()
