"""What storing tables in less memory costs: bytes and step time at ten million rows, AUC on logs with a known answer.

`python experiments/table_memory.py [--frappe=DIR]`; DIR holds train.csv, valid.csv and test.csv of Frappe. Writes the
section of experiments/README.md, and table_memory.png.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from measure import ROOT, replace_section, where_and_when

from dlrm_jax.training import reporting

WAYS = {
    "float32": (),
    "bfloat16": ("--table_dtype=bfloat16",),
    "float16": ("--table_dtype=float16",),
    "quotient-remainder, 4": ("--compress_tables=qr,collisions=4,threshold=50",),
    "mixed dims": ("--compress_tables=mixed,threshold=50",),
}
LARGE = (
    "--dataset=synthetic",
    "--table_sizes=6000000,3000000,1000000,1000",
    "--hotness=1,4,1,1",
    "--num_examples=20000",
)
LARGE += (
    "--num_examples=20000",
    "--embedding_dim=16",
    "--bottom_mlp=64,16",
    "--top_mlp=64,1",
    "--batch_size=2048",
    "--seconds=4",
)


def command(module: str, *flags: str) -> None:
    """Run one of the project's commands."""
    line = [sys.executable, "-m", f"dlrm_jax.{module}", *flags]
    subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def auc(workdir: pathlib.Path, *flags: str) -> float:
    """Test AUC of a training run."""
    command("train", *flags, f"--workdir={workdir}")
    return json.loads((workdir / "result.json").read_text())["test"]["auc"]


def prepare_frappe(directory: pathlib.Path, output: pathlib.Path) -> None:
    """Its published split, every column a category."""
    names = (directory / "train.csv").open().readline().strip().split(",")
    label = next(name for name in names if name.lower() in ("label", "cnt", "click"))
    lines = ["name: frappe", f"label: {label}", "sparse:", *(f"- {{name: {name}}}" for name in names if name != label)]
    schema = output.with_suffix(".yaml")
    split = "split: {by: files, val_files: valid.csv, test_files: test.csv}"
    schema.write_text("\n".join([*lines, split]) + "\n")
    files = ",".join(str(directory / f"{part}.csv") for part in ("train", "valid", "test"))
    command("prepare", f"--input={files}", f"--schema={schema}", f"--output={output}")


def measured(directory: pathlib.Path, frappe: pathlib.Path | None) -> list[dict]:
    """A row a way."""
    rows = []
    if frappe is not None:
        prepare_frappe(frappe, directory / "frappe")
    for i, (name, flags) in enumerate(WAYS.items()):
        command("benchmark", *LARGE, *flags, f"--json={directory}/{i}.json")
        step = json.loads((directory / f"{i}.json").read_text())["train"]
        row = {
            "name": name,
            "bytes": step["held_bytes"] - step["temporary_bytes"],
            "milliseconds": step["step_seconds"] * 1e3,
            "planted": auc(directory / f"planted{i}", "--flagfile=experiments/quickstart.flags", *flags),
        }
        if frappe is not None:
            data = f"--data_dir={directory}/frappe"
            row["frappe"] = auc(directory / f"frappe{i}", data, "--num_epochs=4", "--patience=0", *flags)
        print(row, flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    logs = [log for log in ("planted", "frappe") if log in rows[0]]
    head = ["tables", "tables and optimizer at 10 M rows", "of float32", "step", *(f"test AUC, {log}" for log in logs)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        scores = [f"{row[log]:.4f} ({row[log] - rows[0][log]:+.4f})" for log in logs]
        share = row["bytes"] / rows[0]["bytes"]
        cells = [row["name"], f"{row['bytes'] / 1e6:,.0f} MB", f"{share:.2f}", f"{row['milliseconds']:.2f} ms", *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """AUC over bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        place = (row["bytes"] / 1e6, row["planted"])
        axes.plot(*place, "o")
        # Names above and below in turn, as two types of two bytes lie at one place; the largest to its left.
        side = {"ha": "right"} if place[0] == max(row["bytes"] for row in rows) / 1e6 else {"ha": "left"}
        axes.annotate(row["name"], place, xytext=(0, 7 if i % 2 == 0 else -15), textcoords="offset points", **side)
    axes.set(xlabel="tables and optimizer at 10 M rows, MB", ylabel="test AUC, planted log", xlim=(0, None))
    axes.margins(x=0.25, y=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frappe", type=lambda path: pathlib.Path(path).resolve())
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measured(pathlib.Path(directory), flags.frappe)
    stamp = f"{where_and_when(reporting.versions())}; `python experiments/table_memory.py --frappe=DIR`"
    text = f"{table(rows)}\n\nMeasured {stamp}."
    print(text)
    replace_section(ROOT / "experiments" / "README.md", "table_memory", text)
    draw(rows, ROOT / "experiments" / "table_memory.png")


if __name__ == "__main__":
    main()
