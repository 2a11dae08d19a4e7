"""What int8 layers of the C++ scorer gain and cost; writes the section of experiments/README.md.

`python experiments/int8_layers.py --workdirs=DIR,DIR [--shapes=DIR]`: each workdir, of a finished training, is exported
with --int8_layers, or refused; --shapes is what experiments/peers/kaggle_shaped.py exports, whose AUC means nothing.
Both engines score the same rows in turn in one process, on all cores; times are medians.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np
from measure import ROOT, replace_section, where_and_when

from dlrm_jax.api.exporting import export
from dlrm_jax.api.trained import open_stored
from dlrm_jax.config import ConfigError
from dlrm_jax.serving.artifact import int8_layers
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.signature import from_dict
from dlrm_jax.serving.artifact.store import Version, open_version
from dlrm_jax.serving.artifact.weights import read_dense
from dlrm_jax.training import reporting

COMMAND = "python experiments/int8_layers.py --workdirs=DIR,DIR --shapes=DIR"
BATCHES, TURNS, TURN_SECONDS = (1, 64, 2048), 9, 0.2


def seconds_of(engine: NativeCpu, dense: np.ndarray, ids: np.ndarray) -> float:
    """Of a batch, mean over a turn, the first not counted."""
    engine.run(dense, ids)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < TURN_SECONDS:
        engine.run(dense, ids)
        count += 1
    return (time.perf_counter() - start) / count


def coded_share(version: Version) -> float:
    """Of the products of all layers, those of 8 bits."""
    matrices = [array.shape for array in read_dense(version).values() if array.ndim == 2]
    products = {shape: shape[0] * shape[1] for shape in matrices}
    return sum(products[shape] for shape in matrices if int8_layers.is_coded(*shape)) / sum(map(products.get, matrices))


def timed(version: Version) -> list[str]:
    """A batch size, float32, int8, how many times as fast: each a row's end, as Markdown."""
    signature = from_dict(version.read_json("signature.json"))
    engines = {"float32": NativeCpu(version), "int8": NativeCpu(version, int8=True)}
    rng, rows = np.random.default_rng(0), []
    for batch in BATCHES:
        dense = rng.random((batch, len(signature.dense_names)), np.float32)
        columns = [rng.integers(0, feature.rows, (batch, feature.hotness)) for feature in signature.features]
        ids = np.concatenate(columns, axis=1).astype(np.int32)
        turns = {name: [seconds_of(engine, dense, ids) for engine in engines.values()] for name in range(TURNS)}
        plain, int8 = (statistics.median(turn[i] for turn in turns.values()) for i in range(2))
        faster = statistics.median(turn[0] / turn[1] for turn in turns.values())
        rows.append(f"{batch} | {plain * 1e3:.3f} ms | {int8 * 1e3:.3f} ms | {faster:.2f}x")
    return rows


def exported(workdir: pathlib.Path, out: pathlib.Path) -> tuple[Version, str]:
    """(a version of a run's best checkpoint, what int8 layers change of its AUC on val and test)."""
    run = open_stored(workdir, "best")
    try:
        version = export(run, out, int8_layers=True)
        changes = version.manifest[int8_layers.MEASURED]
        return version, ", ".join(f"{name} {change:+.6f}" for name, change in changes.items())
    except ConfigError as error:
        return export(run, out), f"refused: {str(error).split(', and')[0]}"


def main() -> None:
    """Every model, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", default="", help="with commas between them")
    parser.add_argument("--shapes", type=pathlib.Path)
    flags = parser.parse_args()
    if not flags.workdirs and not flags.shapes:
        parser.error("there is nothing to measure: give --workdirs, or --shapes")
    lines = [
        "| model | products of 8 bits | AUC | batch | float32 | int8 | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as directory:
        found = []
        for i, workdir in enumerate(map(pathlib.Path, filter(None, flags.workdirs.split(",")))):
            found.append(("/".join(workdir.parts[-2:]), *exported(workdir, pathlib.Path(directory) / str(i))))
        if flags.shapes:
            found.append(("Criteo Kaggle's shape, not trained", open_version(flags.shapes), "-"))
        for name, version, changes in found:
            begin = f"| {name} | {coded_share(version):.0%} | {changes} | "
            for row in timed(version):
                lines.append(f"{begin}{row} |")
                print(lines[-1], flush=True)
                begin = "| | | | "
    text = "\n".join(lines) + f"\n\nMeasured {where_and_when(reporting.versions())}; `{COMMAND}`."
    replace_section(ROOT / "experiments" / "README.md", "serving_int8", text)


if __name__ == "__main__":
    main()
