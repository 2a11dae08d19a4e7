"""FuxiCTR beside ours on the same Frappe files, with the published recipes: quality, seconds an epoch, memory.

`python experiments/compare_quality.py --frappe=DIR [--results=DIR] [--fuxictr=DIR] [--only=DLRM,DCNv2] [--turns=3]`:
Frappe's holds train.csv, valid.csv, test.csv. FuxiCTR's environment is made under --fuxictr where there is none: its
package in a Python environment of its own, and a checkout of its repository, whose models the package does not carry.
Each side is trained for --epochs epochs in turn, so that whatever else the machine does hits both: an epoch takes the
median of all turns, of training alone. Then each is trained once as its recipe says, ours with --num_seeds. What is
finished is kept in --results, which published_quality.py may share: turns are added to those there. Writes a table of
experiments/README.md.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import psutil
from measure import ROOT, replace_section, where_and_when
from published_quality import RECIPES, prepare, train

from dlrm_jax.training.reporting import versions

MODELS = {"DLRM": "frappe_dlrm", "DCNv2": "frappe_dcnv2"}
"""FuxiCTR's name, our flag file."""
SOURCE, COMMIT = "https://github.com/reczoo/FuxiCTR", "0245987fdc1d43c36164ea496a02324885a8557a"
PACKAGES = ("fuxictr==2.3.10", "polars<1.30", "torch")
"""That version calls polars in a way that 1.30 no longer has."""
SAMPLED_SECONDS = 2.0
SPLITS = ("val", "test")


def make_environment(directory: pathlib.Path, source: str) -> None:
    """Install FuxiCTR and check out its models, as far as that is not done."""
    zoo, installed = directory / "FuxiCTR", directory / "installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
        subprocess.run([str(directory / "venv/bin/python"), "-m", "pip", "install", "-q", *PACKAGES], check=True)
        installed.touch()
    if not zoo.exists():
        subprocess.run(["git", "clone", "-q", source, str(zoo)], check=True)
        subprocess.run(["git", "-C", str(zoo), "checkout", "-q", COMMIT], check=True)


def run(command: list[str], log: pathlib.Path) -> int:
    """The most bytes that a command and all processes under it held at once, shared memory counted once."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, held(process.pid))
            time.sleep(SAMPLED_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; see {log}")
    return peak


def held(pid: int) -> int:
    """Bytes of a process and those under it (proportional set size)."""
    total = 0
    try:
        for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # One ended meanwhile: the next sample is soon.
        return 0
    return total


def train_theirs(given: argparse.Namespace, model: str, epochs: int) -> dict:
    """What fuxictr_frappe.py writes, and the memory it took."""
    out = given.results / "fuxictr"
    out.mkdir(exist_ok=True)
    command = [str(given.fuxictr / "venv/bin/python"), str(ROOT / "experiments/peers/fuxictr_frappe.py"), model]
    command += [str(given.frappe), str(given.fuxictr / "FuxiCTR"), str(out), str(epochs)]
    peak = run(command, out / f"{model}.log")
    found: dict = json.loads((out / f"{model}.json").read_text())
    return found | {"bytes": peak}


def epochs_of_ours(given: argparse.Namespace, model: str, data: pathlib.Path) -> dict:
    """Seconds an epoch of a short run, and the memory it took."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "dlrm_jax.train", f"--flagfile=experiments/{MODELS[model]}.flags"]
        command += [f"--data_dir={data}", f"--workdir={workdir}", f"--num_epochs={given.epochs}"]
        peak = run(command, given.results / f"{model}_turn.log")
        rate = json.loads((pathlib.Path(workdir) / "result.json").read_text())["samples_per_second"]
    return {"seconds": [RECIPES[MODELS[model]][0] / rate], "bytes": peak}


def compare(given: argparse.Namespace, model: str, data: pathlib.Path) -> dict:
    """What is known of both sides of a model, after what was asked for; kept in --results."""
    path = given.results / f"compare_{model}.json"
    kept: dict = json.loads(path.read_text()) if path.exists() else {"turns": []}
    for _ in range(given.turns):
        turn = {"ours": epochs_of_ours(given, model, data), "theirs": train_theirs(given, model, given.epochs)}
        kept["turns"].append({side: {key: one[key] for key in ("seconds", "bytes")} for side, one in turn.items()})
        kept["versions"] = turn["theirs"]["versions"]
        path.write_text(json.dumps(kept, indent=1))
    if "whole" in given.parts and "theirs" not in kept:
        kept["theirs"] = train_theirs(given, model, epochs=0)
        path.write_text(json.dumps(kept, indent=1))
    ours = given.results / MODELS[model]
    if "whole" in given.parts:
        train(MODELS[model], data, ours, given.num_seeds, {})
    if (ours / "seeds.json").exists():
        kept["ours"] = json.loads((ours / "seeds.json").read_text())
    return kept


def table(rows: dict[str, dict]) -> str:
    """Markdown, a row a model and side."""
    lines = ["| model | of | seeds | val AUC | test AUC | test log loss | an epoch | turns | peak memory |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for model, found in rows.items():
        seconds = {side: of_turns(found, side) for side in ("ours", "theirs")}
        for side, name in (("ours", "dlrm_jax"), ("theirs", "FuxiCTR")):
            times = f" ({times_as_fast(found)})" if side == "ours" else ""
            peak = max(turn[side]["bytes"] for turn in found["turns"])
            lines.append(
                f"| {model} | {name} | {quality(found.get(side))} | {seconds[side]:.1f} s{times} | "
                f"{len(found['turns'])} | {peak / 1e9:.1f} GB |"
            )
    return "\n".join(lines)


def quality(trained: dict | None) -> str:
    """Seeds, val AUC, test AUC and log loss of whole trainings: their means, or a dash for each where there is none."""
    if trained is None:
        return "- | - | - | -"
    seeds, metrics = 1, trained
    if "runs" in trained:
        means = {split: {name: of["mean"] for name, of in trained["summary"][split].items()} for split in SPLITS}
        seeds, metrics = len(trained["runs"]), means
    val, test = (metrics[split] for split in SPLITS)
    return f"{seeds} | {val['auc']:.5f} | {test['auc']:.5f} | {test['log_loss']:.5f}"


def times_as_fast(found: dict) -> str:
    """Theirs over ours: of all turns, and the least and the most of one."""
    whole = of_turns(found, "theirs") / of_turns(found, "ours")
    each = [of_turns({"turns": [turn]}, "theirs") / of_turns({"turns": [turn]}, "ours") for turn in found["turns"]]
    return f"{whole:.1f}x as fast; by turn {min(each):.1f} to {max(each):.1f}"


def of_turns(found: dict, side: str) -> float:
    """Median seconds of an epoch over all turns."""
    return statistics.median(seconds for turn in found["turns"] for seconds in turn[side]["seconds"])


def main() -> None:
    """Train and measure what is not there yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    resolved = lambda path: pathlib.Path(path).resolve()  # noqa: E731
    parser.add_argument("--frappe", required=True, type=resolved)
    parser.add_argument("--results", default="runs/published", type=resolved)
    parser.add_argument("--fuxictr", default="runs/fuxictr", type=resolved, help="where its environment is, or goes")
    parser.add_argument("--source", default=SOURCE, help="what its repository is cloned from")
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--parts", default="whole", help="empty: only further turns, no whole training")
    parser.add_argument("--num_seeds", default=5, type=int)
    parser.add_argument("--turns", default=3, type=int)
    parser.add_argument("--epochs", default=2, type=int, help="of each turn")
    given = parser.parse_args()
    for directory in (given.results, given.fuxictr):
        directory.mkdir(parents=True, exist_ok=True)
    make_environment(given.fuxictr, given.source)
    data = prepare(given.frappe, given.results)
    as_it_is = argparse.Namespace(**(vars(given) | {"turns": 0, "parts": ""}))
    rows = {}
    for model in MODELS:
        if model in given.only.split(","):
            rows[model] = compare(given, model, data)
        elif (given.results / f"compare_{model}.json").exists():
            rows[model] = compare(as_it_is, model, data)
    used = ", ".join(f"{name} {version}" for name, version in next(iter(rows.values()))["versions"].items())
    command = "python experiments/compare_quality.py --frappe=DIR"
    stamp = f"Measured {where_and_when(versions())}; {used}; `{command}`."
    replace_section(ROOT / "experiments" / "README.md", "fuxictr", f"{table(rows)}\n\n{stamp}")


if __name__ == "__main__":
    main()
