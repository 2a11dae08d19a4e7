"""What few bits cost: AUC and bytes of exported models, by --tables; writes the section of experiments/README.md.

`python experiments/quantised_tables.py --movielens=DIR`.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from measure import ROOT, replace_section, where_and_when

from dlrm_jax.serving.artifact.quantise import TABLE_TYPES
from dlrm_jax.serving.artifact.store import open_version
from dlrm_jax.training import reporting

RUNS = (
    ("quickstart", ()),
    ("quickstart", ("--embedding_dim=64", "--bottom_mlp=64,64")),
    ("movielens_100k", ()),
    ("movielens_100k", ("--embedding_dim=64", "--bottom_mlp=64,64")),
)


def command(module: str, *flags: str) -> None:
    """Run one of the project's commands."""
    line = [sys.executable, "-m", f"dlrm_jax.{module}", *flags]
    subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Train, export every way, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--movielens", type=lambda path: str(pathlib.Path(path).resolve()), required=True)
    flags = parser.parse_args()
    lines = ["| model | D | tables | bytes | of float32 | test AUC | difference |", "|---|---|---|---|---|---|---|"]
    for name, changes in RUNS:
        with tempfile.TemporaryDirectory() as directory:
            data = [f"--data_dir={flags.movielens}"] if name.startswith("movielens") else []
            run = [f"--workdir={directory}/run"]
            command("train", f"--flagfile=experiments/{name}.flags", *changes, *data, *run)
            whole: tuple[float, int] | None = None
            for kind in TABLE_TYPES:
                command("export", *run, f"--out={directory}/{kind}", f"--tables={kind}", "--evaluate=test")
                version = open_version(pathlib.Path(directory) / kind)
                auc = version.read_json("metrics.json")["test"]["auc"]
                size, dim = version.manifest["table_bytes"], version.read_json("signature.json")["embedding_dim"]
                whole = whole or (auc, size)
                difference = f"{auc - whole[0]:+.6f}"
                lines.append(
                    f"| `{name}` | {dim} | {kind} | {size:,} | {size / whole[1]:.4f} | {auc:.6f} | {difference} |"
                )
    stamp = where_and_when(reporting.versions())
    text = "\n".join(lines) + f"\n\nMeasured {stamp}; `python experiments/quantised_tables.py --movielens=DIR`."
    print(text)
    replace_section(ROOT / "experiments" / "README.md", "serving_quantised", text)


if __name__ == "__main__":
    main()
