"""Search for the flags that train best: `python -m dlrm_jax.tune --flagfile=FILE --search=FILE --workdir=DIR`.

The search's file, YAML or JSON, says what is tried:

    method: halving          # or random, grid
    num_trials: 27
    flags:
      learning_rate: {low: 0.001, high: 0.1, log: true}
      top_mlp: [[64, 32, 1], [128, 64, 1]]
      table_optimizer: [adam, rowwise_adagrad]

Each trial is a training in a workdir of its own, compared by --target_metric on val; the same command goes on with a
search that was stopped. `best.flags` trains the best one again.
"""

import math
import pathlib
import sys

from absl import flags
from tqdm import tqdm

from dlrm_jax.cli import flags as run_flags
from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.flags import config_from_flags, define_run_flags, flagfile_text
from dlrm_jax.config import ConfigError, require, to_dict
from dlrm_jax.host import files
from dlrm_jax.training import reporting
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.tuning import trials as of_search
from dlrm_jax.tuning.search import read_search, rounds, trials

FLAGS = flags.FLAGS


def define_tune_flags() -> None:
    """Define this command's own flags."""
    flags.DEFINE_string("search", None, "YAML or JSON file of what is searched.", required=True)


def _base_flags() -> str:
    """The flags that all trials share, one a line."""
    return "".join(f"{line}\n" for line in flagfile_text().splitlines() if not line.startswith("--workdir"))


def _require_flags(each: list[dict[str, str]]) -> None:
    """ConfigError for a flag that there is not, or for a value that it cannot have."""
    for given in each:
        for name, value in given.items():
            require(name in run_flags.run_settings(), f"--search: {name!r} is not a flag of training")
            try:
                FLAGS[name].parser.parse(value)
            except ValueError as error:
                raise ConfigError(f"--search: {name}={value}: {error}") from None


def _length(config: RunConfig, share: float) -> dict[str, str]:
    """The flags of a share of a run's steps."""
    if share == 1:
        return {}
    if config.num_steps:
        return {"num_steps": str(max(1, math.ceil(share * config.num_steps)))}
    return {"num_epochs": str(max(1, round(share * config.num_epochs)))}


def main() -> None:
    """Flags to trials, trials to runs, runs to a table, a picture and the best flags."""
    config, path = config_from_flags(), pathlib.Path(FLAGS.search)
    files.require_input_file("search", FLAGS.search)
    require(bool(FLAGS.workdir), "--workdir is missing; it says where trials and results go")
    workdir = pathlib.Path(FLAGS.workdir)
    search = read_search(path)
    each = trials(search, config.seed)
    _require_flags(each)
    files.require_output_directory("workdir", workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with files.alone(workdir / files.LOCK, f"another search is running in {workdir}"):
        found = of_search.Trials(
            workdir=workdir,
            flagfile=workdir / "base.flags",
            flags=each,
            metric=config.target_metric,
            smaller_is_better=config.smaller_is_better,
            length=lambda share: _length(config, share),
        )
        base = _base_flags()
        of_search.kept_file(found, {"search": to_dict(search), "flags": base, "seed": config.seed})
        found.flagfile.write_text(base)
        plan = rounds(search, len(each))
        with tqdm(total=sum(one.num_trials for one in plan), unit="trial", file=sys.stderr) as bar:

            def show(outcome: of_search.Outcome) -> None:
                bar.set_postfix_str(f"val {found.metric} {outcome.value}" if outcome.value else outcome.error[:40])
                bar.update()

            order = of_search.ranked(found.run(plan, show), found.smaller_is_better)
        winner = of_search.require_one(order)
        reporting.write_json_atomically(workdir / "tune.json", of_search.as_json(found, order))
        (workdir / "best.flags").write_text(of_search.best_flags(found, winner))
        of_search.draw(found, order, workdir / "tune.png")
    print(of_search.table(found, order))
    print(f"best: --flagfile={workdir}/best.flags; table and picture are in {workdir} (tune.json, tune.png)")


def command() -> None:
    """The command, as a console script calls it too."""
    define_tune_flags()
    define_run_flags()
    run_command(main)


if __name__ == "__main__":
    command()
