"""Speed and memory of preparing and reading: `python experiments/measure_preparation.py [--rows=500000,5000000]`.

Writes the tables between the `<!-- preparation -->` marks of experiments/README.md. Each run is the whole
command, from starting Python to the finished dataset; the fastest of `--repeats` and all of them are given, because
the machine is shared. Memory is the peak resident set of the process.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from criteo_text import write
from measure import ROOT, replace_section, where_and_when

from dlrm_jax.data.generate import multi_hot
from dlrm_jax.data.packed_rows import row_words
from dlrm_jax.data.read.pipeline import Cut, batch_windows, window_steps
from dlrm_jax.data.read.prepared import open_prepared, read_json
from dlrm_jax.training.reporting import versions

REFERENCE_ROWS_PER_SECOND = 7_300
"""facebookresearch/dlrm's own preprocessing of 500,000 such rows on a machine of 2 cores: 68 s."""
MODES = {"vocabulary": "criteo_kaggle", "hash": "criteo_kaggle_hash"}


def prepare(log: str, output: pathlib.Path, schema: str) -> tuple[float, float]:
    """(seconds, peak MB) of the command."""
    command = [sys.executable, "-m", "dlrm_jax.prepare", f"--input={log}", f"--output={output}", f"--schema={schema}"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1000


def preparation_table(sizes: list[int], repeats: int, folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    """(Markdown, the last vocabulary dataset)."""
    lines = [
        "| rows | ids | rows/s (fastest of runs) | all runs | against 7.3 k rows/s | peak memory | vocabulary values |",
        "|---|---|---|---|---|---|---|",
    ]
    kept = folder
    for rows in sizes:
        log = folder / f"log_{rows}.txt"
        write(str(log), rows)
        runs: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        for repeat in range(repeats):
            for mode, schema in MODES.items():
                output = folder / f"{mode}_{rows}_{repeat}"
                runs[mode].append(prepare(str(log), output, schema))
                if mode == "vocabulary":
                    kept = output
        for mode, measured in runs.items():
            rates = [rows / seconds for seconds, _ in measured]
            values = "-"
            if mode == "vocabulary":
                tables = read_json(kept / "statistics.json")["tables"].values()
                values = f"{sum(table['rows'] for table in tables):,}"
            shown = ", ".join(f"{rate / 1000:,.0f} k" for rate in rates)
            memory = max(peak for _, peak in measured)
            ratio = max(rates) / REFERENCE_ROWS_PER_SECOND
            lines.append(
                f"| {rows:,} | {mode} | **{max(rates):,.0f}** | {shown} | {ratio:.0f}x | {memory:,.0f} MB | {values} |"
            )
    return "\n".join(lines), kept


def reading_speed(dataset: pathlib.Path, batch_size: int = 2048) -> list[float]:
    """Rows/s of shuffled batches, ready on the host, in three epochs."""
    split = open_prepared(dataset).splits["train"]
    rates = []
    for epoch in range(3):
        start = time.perf_counter()
        cut = Cut(batch_size, window_steps(4 * row_words(13, 26), batch_size))
        for _ in batch_windows(iter([split.sources(0, epoch, shuffle=True)]), cut):
            pass
        rates.append(len(split) / (time.perf_counter() - start))
    return rates


def input_wait(dataset: pathlib.Path, folder: pathlib.Path) -> dict:
    """result.json of 2,000 steps of the Criteo flag file on prepared data."""
    command = [sys.executable, "-m", "dlrm_jax.train", "--flagfile=experiments/criteo_kaggle.flags"]
    command += [f"--data_dir={dataset}", f"--workdir={folder / 'run'}", "--num_steps=2000", "--eval_every=2000"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "run" / "result.json").read_text())


def multi_hot_speed() -> str:
    """Virtual bags of MLPerf's sizes, batch 2048: on the host by NumPy, and compiled."""
    import jax

    rng = np.random.default_rng(0)
    rows, sizes = (
        (40_000_000,) * 26,
        (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1),
    )
    expander = multi_hot.Expander(rows, sizes, "uniform")
    ids = rng.integers(0, 40_000_000, (2048, 26)).astype(np.int32)
    compiled = jax.jit(lambda ids_BxF: expander.compute(jax.numpy, ids_BxF))
    times: dict[str, list[float]] = {"NumPy": [], "compiled": []}
    for _ in range(20):
        for name, compute in (("NumPy", lambda: expander.compute(np, ids)), ("compiled", lambda: compiled(ids))):
            start = time.perf_counter()
            jax.block_until_ready(compute())
            times[name].append(time.perf_counter() - start)
    shown = ", ".join(f"{name} {np.median(t) * 1000:.2f} ms" for name, t in times.items())
    return (
        f"Virtual multi-hot bags (214 ids a row, batch 2048, median of 20): {shown}; training uses the compiled ones."
    )


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="500000,5000000")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        table, dataset = preparation_table([int(rows) for rows in flags.rows.split(",")], flags.repeats, folder)
        rates = reading_speed(dataset)
        result = input_wait(dataset, folder)
    reading = (
        f"Reading it back (13 dense and 26 sparse columns, shuffled, batches of 2048, ready on the host): "
        f"{', '.join(f'{rate / 1e6:.1f}' for rate in rates)} M rows/s. Waiting for input in `criteo_kaggle.flags`: "
        f"{result['input_wait_fraction']:.2%} of the step time, at {result['samples_per_second']:,.0f} samples/s."
    )
    stamp = where_and_when(versions())
    text = f"{table}\n\n{reading}\n\n{multi_hot_speed()}\n\n"
    text += f"Measured {stamp}; `python experiments/measure_preparation.py`."
    replace_section(ROOT / "experiments" / "README.md", "preparation", text)


if __name__ == "__main__":
    main()
