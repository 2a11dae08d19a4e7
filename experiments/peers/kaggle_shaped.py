"""Export a model of Criteo Kaggle's shape with new-born weights: `python experiments/peers/kaggle_shaped.py OUT`.

33.8 M rows of 16, MLPs 512-256-64-16 and 512-256-1 (experiments/shape_kaggle.flags): what a prediction costs does not
depend on what was learned. `--tables=int8` as in dlrm_jax.export; `--scale` divides the rows of each table.
"""

import argparse
import pathlib

import numpy as np

from dlrm_jax.config import LossConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.data.generate import synthetic
from dlrm_jax.serving.artifact.export import export_model, of_arrays
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.run_config import ModelOptions
from dlrm_jax.training.state import init_state

FLAG_FILE = pathlib.Path(__file__).resolve().parents[1] / "shape_kaggle.flags"


def main() -> None:
    """Born, exported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tables", choices=TABLE_TYPES, default="float32")
    parser.add_argument("--scale", type=int, default=1)
    flags = parser.parse_args()
    line = next(line for line in FLAG_FILE.read_text().splitlines() if line.startswith("--table_sizes="))
    sizes = tuple(max(1, int(size) // flags.scale) for size in line.partition("=")[2].split(","))
    dataset = synthetic.generate(synthetic.Spec(13, sizes, (1,), 1.05, ""), seed=0, num_examples=20_000)
    options = ModelOptions(embedding_dim=16, bottom_mlp=(512, 256, 64, 16), top_mlp=(512, 256, 1))
    model = options.build(dataset)
    state = init_state(model, OptimizerConfig(ScheduleConfig(learning_rate=0.1)), seed=0)
    tables = {name: np.asarray(rows) for name, rows in named_tables(model, state.tables)}
    dense_params = state.dense_params
    del state
    args = (model, LossConfig(), dense_params, of_arrays(tables), dataset, flags.tables)
    print(export_model(flags.out, *args, evaluated=("test",)).directory)


if __name__ == "__main__":
    main()
