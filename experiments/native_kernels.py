"""Steps whose tables XLA or C++ looks up and updates, on a CPU: what `--kernels=auto` chooses by.

    python experiments/native_kernels.py [--turns=5]

Of each model: a step with XLA's lookup and update, with XLA's lookup and the update by C++, and with both by C++, in
turns in one process; medians. Batches are ready in memory, synthetic ids of a power law; tables lie on huge pages.
Writes the table of experiments/README.md.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import statistics

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags
from compare_peers import in_turns, stepping
from measure import replace_section, where_and_when

from dlrm_jax.cli.flags import config_from_flags, define_run_flags
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.pipeline import Cut, batch_windows, train_epochs
from dlrm_jax.host import heap
from dlrm_jax.host.formulations import AUTO, NATIVE, XLA
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.kernels import build
from dlrm_jax.tables.kernels.choice import ALL_XLA, Kernels, chosen, table_ops
from dlrm_jax.training.opening import Opened, open_run
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.step import make_train_step

HERE = pathlib.Path(__file__).resolve().parent
WAYS = (ALL_XLA, Kernels(XLA, NATIVE), Kernels(NATIVE, NATIVE))
SMALL = "--dataset=synthetic --table_sizes=100000,100000,100000,10000,10000,1000,1000 --embedding_dim=32 "
SMALL += "--bottom_mlp=64,32 --top_mlp=64,1 --batch_size=1024"
MODELS = {
    "quickstart, 256 examples": f"--flagfile={HERE}/quickstart.flags",
    "kaggle, 128 examples": f"--flagfile={HERE}/shape_kaggle.flags --batch_size=128 --max_rows_per_table=1000000",
    "kaggle, 2,048 examples": f"--flagfile={HERE}/shape_kaggle.flags --batch_size=2048 --max_rows_per_table=1000000",
    **{f"7 tables, bags of {h}, 1,024 examples": f"{SMALL} --hotness={h}" for h in (1, 2, 3, 4, 8)},
}
RULES = ("sgd", "adagrad", "rowwise_adagrad")


def config_of(model: str, rule: str) -> RunConfig:
    """A model's run with one rule for its tables."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["native_kernels", *MODELS[model].split(), f"--table_optimizer={rule}", "--dense_optimizer=sgd"])
    return config_from_flags()


def batches_of(opened: Opened, placed: Placed, count: int = 4) -> list[Batch]:
    """Different ones."""
    config, train = opened.config, opened.dataset.splits["train"]
    epochs = train_epochs(train, config.batch_size, config.seed, 0, config.shuffle)
    with contextlib.closing(batch_windows(epochs, Cut(config.batch_size, count))) as windows:
        window = next(windows)
    return [placed.put(window[i].batch) for i in range(count)]


class Steps:
    """A model's step by each of WAYS, which work on one state."""

    def __init__(self, opened: Opened) -> None:
        config = opened.config
        self.placed = placed = on_one_device(opened.model, config.optimizer)
        self.state = placed.init_state(config.seed)
        self.auto = chosen(AUTO, placed.model, placed.optimizer, placed.mesh)
        self._steps = {}
        for kernels in WAYS:
            parts = (kernels, placed.model, placed.optimizer, placed.stacks, placed.mesh, ExchangeOptions())
            step = make_train_step(placed.model, config.loss, placed.optimizer, 1, table_ops(*parts))
            self._steps[kernels] = placed.jit_step(step)

    def __call__(self, kernels: Kernels, batch: Batch) -> None:
        """One step, waited for."""
        self.state, _ = jax.block_until_ready(self._steps[kernels](self.state, batch))


def row(model: str, rule: str, turns: int) -> str:
    """One model under one rule, as Markdown; what `auto` takes in bold."""
    opened = open_run(config_of(model, rule))
    steps = Steps(opened)
    batches = batches_of(opened, steps.placed)
    sides = {str(i): stepping(functools.partial(steps, kernels), batches) for i, kernels in enumerate(WAYS)}
    milliseconds = [1e3 * statistics.median(taken) for taken in in_turns(sides, turns).values()]
    shown = [
        f"**{ms:.2f} ms**" if kernels == steps.auto else f"{ms:.2f} ms"
        for kernels, ms in zip(WAYS, milliseconds, strict=True)
    ]
    auto = milliseconds[WAYS.index(steps.auto)]
    return f"| {model} | {rule} | {' | '.join(shown)} | {milliseconds[0] / auto:.2f}x |"


def main() -> None:
    """Every model under every rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    define_run_flags()
    build.register()
    heap.keep_freed_temporaries()
    lines = ["| model | tables' rule | XLA | update by C++ | both by C++ | XLA over auto |", "|" + 6 * "---|"]
    for model in MODELS:
        for rule in RULES:
            lines.append(row(model, rule, options.turns))
            print(lines[-1], flush=True)
    from dlrm_jax.training.reporting import versions

    where = f"{where_and_when(versions())}; `python experiments/native_kernels.py`."
    replace_section(HERE / "README.md", "native_kernels", "\n".join([*lines, "", where]))


if __name__ == "__main__":
    main()
