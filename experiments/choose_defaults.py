"""How the defaults of optimizers, rate, batch and epochs were chosen.

`python experiments/choose_defaults.py --shared=DIR`: DIR holds ml-100k, frappe and criteo_sample. Each of SETTINGS
trains on each data set (defaults_data.py), and the smallest mean regret decides: how far a setting's validation AUC is
from the best one's on that data set, averaged. Test AUC is reported, and has no part in it. Finished runs are kept in
--results, where the same command goes on. `--readme` renews the table of experiments/README.md.
"""

import argparse
import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import defaults_data
from measure import ROOT, replace_section, where_and_when

from dlrm_jax.cli.flags import FLAGS, config_from_flags, define_run_flags
from dlrm_jax.training.loop import train_and_evaluate
from dlrm_jax.training.reporting import versions

NAMES = ("dense_optimizer", "table_optimizer", "learning_rate", "batch_size", "num_epochs", "patience")
CHOSEN = ("adagrad", "rowwise_adagrad", "0.02", "256", "20", "2")
FORMER = ("sgd", "sgd", "0.1", "128", "1", "0")
SETTINGS = (
    CHOSEN,
    FORMER,
    *(("adagrad", "rowwise_adagrad", rate, "256", "20", "2") for rate in ("0.01", "0.04")),
    *(("adagrad", "adagrad", rate, "256", "20", "2") for rate in ("0.02", "0.04")),
    *(("adam", "rowwise_adagrad", rate, "256", "20", "2") for rate in ("0.005", "0.01")),
    ("adam", "adagrad", "0.005", "256", "20", "2"),
    *(("adagrad", "rowwise_adagrad", "0.02", batch, "20", "2") for batch in ("128", "1024")),
    ("sgd", "sgd", "0.1", "128", "20", "2"),
)
SEEDS = {"shop": 2, "criteo": 3}
"""Runs that are averaged, where one says little: 3,000 and 200 rows to validate on."""
NOT_COUNTED = ("criteo",)
"""Shown only: an AUC on 200 rows is uncertain by 0.03, ten times what the settings differ by elsewhere."""


def train(directory: pathlib.Path, setting: tuple[str, ...], seed: int) -> dict[str, float]:
    """Validation and test AUC of a run in a throw-away workdir."""
    with tempfile.TemporaryDirectory() as workdir, silent():
        FLAGS.unparse_flags()
        given = [f"--{name}={value}" for name, value in zip(NAMES, setting, strict=True)]
        FLAGS(["choose_defaults", f"--data_dir={directory}", f"--seed={seed}", *given])
        result = train_and_evaluate(config_from_flags(), pathlib.Path(workdir))
    return {split: result[split]["auc"] for split in ("val", "test")} | {"step": result["step"]}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No progress lines."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


class Results:
    """What runs came to, in a file of JSON lines."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._known: dict[tuple, dict[str, float]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            self._known[tuple(entry["key"])] = entry["value"]

    def get(self, key: tuple, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The result of `key`, computed now if it is not there."""
        if key not in self._known:
            self._known[key] = compute()
            with self._path.open("a") as file:
                print(json.dumps({"key": key, "value": self._known[key]}), file=file)
            print(*key, self._known[key], flush=True)
        return self._known[key]


def mean_of(results: Results, data: str, directory: pathlib.Path, setting: tuple[str, ...]) -> dict[str, float]:
    """The mean over the data set's seeds."""
    runs = [
        results.get((data, *setting, seed), lambda seed=seed: train(directory, setting, seed))
        for seed in range(SEEDS.get(data, 1))
    ]
    return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}


def table(found: dict[str, dict[tuple[str, ...], dict]], plain: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a setting, the smallest mean regret first; a column a data set."""
    best = {data: max(run["val"] for run in runs.values()) for data, runs in found.items()}

    def line(names: str, runs: dict[str, dict[str, float]]) -> tuple[float, str]:
        gaps = {data: best[data] - runs[data]["val"] for data in found}
        counted = [gap for data, gap in gaps.items() if data not in NOT_COUNTED] or [0.0]
        mean = sum(counted) / len(counted)
        cells = " | ".join(f"{runs[data]['test']:.4f} ({gap:.4f})" for data, gap in gaps.items())
        return mean, f"| {names} | {mean:.4f} | {cells} |"

    rows = []
    for setting in SETTINGS:
        dense, tables, *rest, _ = setting
        names = (f"**{dense}**", f"**{tables}**") if setting == CHOSEN else (dense, tables)
        rows.append(line(" | ".join((*names, *rest)), {data: found[data][setting] for data in found}))
    return "\n".join(
        [
            f"| MLPs | tables | rate | batch | epochs | mean regret | {' | '.join(found)} |",
            f"|{'---|' * (6 + len(found))}",
            *(text for _, text in sorted(rows)),
            line("logistic regression | | | | ", plain)[1],
        ]
    )


def main() -> None:
    """Prepare, train what is missing, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", required=True, type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--results", default=ROOT / "runs" / "choose_defaults.jsonl", type=pathlib.Path)
    parser.add_argument("--data", default=",".join(defaults_data.DATA_SETS), help="which data sets, with commas")
    parser.add_argument("--readme", action="store_true", help="renew the section of experiments/README.md")
    flags = parser.parse_args()
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    define_run_flags()
    results, found, plain = Results(flags.results), {}, {}
    for data in flags.data.split(","):
        directory = defaults_data.make(data, flags.shared, flags.results.parent / "choose_defaults")
        plain[data] = results.get((data, "logistic"), lambda path=directory: defaults_data.logistic_regression(path))
        found[data] = {setting: mean_of(results, data, directory, setting) for setting in SETTINGS}
    text = table(found, plain)
    print(text)
    if flags.readme:
        stamp = f"Measured {where_and_when(versions())}; `python experiments/choose_defaults.py --shared=DIR --readme`."
        replace_section(ROOT / "experiments" / "README.md", "defaults", f"{text}\n\n{stamp}")


if __name__ == "__main__":
    main()
