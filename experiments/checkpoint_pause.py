"""How long a training waits for its checkpoints; writes the section of experiments/README.md.

`python experiments/checkpoint_pause.py [--rows=8000000] [--turns=5]`: one table of that many rows of 16 with row-wise
Adagrad. Of a step at which the best and the latest checkpoint are due: seconds that the training waits, and that it
would wait if the latest began when the best is on disk; a copy of the same arrays beside it. In turns, medians.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
from measure import ROOT, replace_section, where_and_when

from dlrm_jax.config import FeatureConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TableConfig
from dlrm_jax.training.checkpoint import BEST, LATEST, Checkpoints
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.reporting import versions


def main() -> None:
    """Copies and saves in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--turns", type=int, default=5)
    flags = parser.parse_args()
    model = ModelConfig(
        num_dense=13,
        tables=(TableConfig("t", flags.rows, 16),),
        features=(FeatureConfig("f", "t"),),
        bottom_mlp=(64, 16),
        top_mlp=(64, 1),
    )
    placed = on_one_device(model, OptimizerConfig(ScheduleConfig(learning_rate=0.1), table="rowwise_adagrad"))
    state = jax.block_until_ready(placed.init_state(0))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", "waits", "on disk", "one after the other")}

    def clocked(name: str, call: object) -> None:
        start = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as directory, Checkpoints(pathlib.Path(directory)) as checkpoints:
        for turn in range(1, 2 * flags.turns + 1):
            state = state.replace(step=jnp.int32(turn))

            def save(kind: str, state: object = state) -> None:
                checkpoints.save(kind, state, placed, {"turn": 0})

            clocked("copy", lambda state=state: jax.block_until_ready(jax.tree.map(jnp.copy, state)))
            if turn % 2:
                start = time.perf_counter()
                clocked("waits", lambda save=save: (save(BEST), save(LATEST)))
                checkpoints.wait()
                seconds["on disk"].append(time.perf_counter() - start)
            else:
                clocked("one after the other", lambda save=save: (save(BEST), checkpoints.wait(), save(LATEST)))
                checkpoints.wait()
    copy, waits, on_disk, before = (statistics.median(times) for times in seconds.values())
    text = (
        "| state | a copy of it | the training waits | would wait, one after the other | both on disk after |\n"
        "|---|---|---|---|---|\n"
        f"| {num_bytes / 1e9:.2f} GB | {copy:.2f} s | {waits:.2f} s | {before:.2f} s | {on_disk:.2f} s |\n\n"
        f"Measured {where_and_when(versions())}; `python experiments/checkpoint_pause.py --rows={flags.rows}`."
    )
    print(text)
    replace_section(ROOT / "experiments" / "README.md", "checkpoint_pause", text)


if __name__ == "__main__":
    main()
