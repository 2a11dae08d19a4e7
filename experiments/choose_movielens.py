"""How the MovieLens flag files were chosen: a grid of learning rates, epochs and seeds, ranked by validation AUC.

`python experiments/choose_movielens.py --data_dir=DIR [--flagfile=FILE] [--learning_rates=...] [--epochs=...]
[--seeds=...]` prints one line a run, best last. The test split is never read from a result.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def validation_auc(flagfile: str, data_dir: str, *flags: str) -> float:
    """Best validation AUC of one run in a throw-away workdir."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "dlrm_jax.train", f"--flagfile={flagfile}", f"--data_dir={data_dir}"]
        subprocess.run([*command, f"--workdir={workdir}", *flags], cwd=ROOT, check=True, capture_output=True)
        return json.loads((pathlib.Path(workdir) / "result.json").read_text())["val"]["auc"]


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True, type=lambda path: str(pathlib.Path(path).resolve()))
    parser.add_argument("--flagfile", default="experiments/movielens_100k.flags")
    parser.add_argument("--learning_rates", default="0.02,0.03,0.04,0.05")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--seeds", default="0,1,2,3")
    flags = parser.parse_args()
    names = ("learning_rate", "num_epochs", "seed")
    runs = []
    for values in itertools.product(*(text.split(",") for text in (flags.learning_rates, flags.epochs, flags.seeds))):
        settings = [f"--{name}={value}" for name, value in zip(names, values, strict=True)]
        runs.append((validation_auc(flags.flagfile, flags.data_dir, *settings), " ".join(settings)))
    for auc, settings in sorted(runs):
        print(f"val AUC {auc:.5f}  {settings}")


if __name__ == "__main__":
    main()
