"""One run with several seeds: each in a directory of its own, and how far their metrics lie apart."""

import dataclasses
import json
import logging
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.read.load import CACHE, load_dataset
from dlrm_jax.host import processes
from dlrm_jax.host.texts import aligned
from dlrm_jax.training import reporting
from dlrm_jax.training.loop import train_and_evaluate
from dlrm_jax.training.origin import OpenModel
from dlrm_jax.training.run import the_only_training
from dlrm_jax.training.run_config import RunConfig

SEEDS = "seeds.json"
_SPLITS = ("val", "test")
_METRICS = tuple(name for name in reporting.METRIC_COLUMNS if name != "num_samples")
_LOG = logging.getLogger("dlrm_jax")


def train_seeds(
    config: RunConfig,
    workdir: pathlib.Path,
    num_seeds: int,
    flagfile: str | None = None,
    defaults: str = "",
    open_model: OpenModel | None = None,
) -> dict[str, Any]:
    """Train with seeds `config.seed`, the next, and so on, in `workdir/seed-N`; what `seeds.json` says.

    All train on the data of `config.data`, whose own seed stays. A seed that is finished, with these settings on this
    data, is not run again; one that was stopped goes on. Raises what `train_and_evaluate` raises.
    """
    require(num_seeds >= 1, f"--num_seeds={num_seeds}; it must be at least 1")
    require(config.seed + num_seeds <= 2**63, f"--seed={config.seed} and --num_seeds={num_seeds} go beyond 2^63")
    require(processes.count() == 1, "--num_seeds trains with one process; start one run a seed where there are several")
    if (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} holds a run of one seed; choose another --workdir for --num_seeds={num_seeds}")
    workdir.mkdir(parents=True, exist_ok=True)
    with the_only_training(workdir):
        of_all = {
            "settings": json.loads(json.dumps(dataclasses.asdict(config))),
            "data": load_dataset(config.data, config.allow_oversubscription, workdir).fingerprint(),
        }
        earlier = reporting.earlier(workdir, SEEDS)
        finished = earlier.get("runs", {}) if all(earlier.get(key) == value for key, value in of_all.items()) else {}
        if flagfile is not None:
            (workdir / "flags.txt").write_text(flagfile)
        runs: dict[str, dict[str, Any]] = {}
        for seed in range(config.seed, config.seed + num_seeds):
            own = workdir / f"seed-{seed}"
            if str(seed) in finished and (own / "result.json").exists():
                _LOG.info("seed %d is finished already", seed)
                runs[str(seed)] = finished[str(seed)]
            else:
                _LOG.info("seed %d, %d of %d, in %s", seed, len(runs) + 1, num_seeds, own)
                _share_prepared(workdir, own)
                of_seed = dataclasses.replace(config, seed=seed)
                result = train_and_evaluate(of_seed, own, defaults=defaults, open_model=open_model)
                runs[str(seed)] = {key: result[key] for key in ("step", *_SPLITS)}
            # Those that are finished, but not asked for now, stay known.
            written = of_all | {"runs": finished | runs, "summary": summary(runs)}
            reporting.write_json_atomically(workdir / SEEDS, written)
    return written


def _share_prepared(workdir: pathlib.Path, own: pathlib.Path) -> None:
    """A raw log is prepared once for all seeds: each finds it where a run has its own."""
    if (workdir / CACHE).exists() and not (own / CACHE).exists():
        own.mkdir(exist_ok=True)
        (own / CACHE).symlink_to(pathlib.Path("..") / CACHE, target_is_directory=True)


def summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By split and metric: mean, minimum, maximum, spread (their difference) and sample deviation over the runs.

    A split that a run did not score, or a metric that is not a number in one, is left out.
    """
    out: dict[str, dict[str, dict[str, float]]] = {}
    for split in _SPLITS:
        scored = [run[split] for run in runs.values()]
        for metric in _METRICS if all(scored) else ():
            values = [values.get(metric) for values in scored]
            if any(value is None or value != value for value in values):
                continue
            out.setdefault(split, {})[metric] = {
                "mean": statistics.fmean(values),
                "minimum": min(values),
                "maximum": max(values),
                "spread": max(values) - min(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
    return out


def format_seeds(written: Mapping[str, Any]) -> str:
    """`summary` as an aligned table, a row a metric."""
    header = ["split", "metric", "mean", "minimum", "maximum", "spread", "deviation"]
    rows = [header]
    for split, metrics in written["summary"].items():
        for metric, values in metrics.items():
            rows.append([split, metric, *(f"{values[name]:.5f}" for name in header[2:])])
    return aligned(rows, left=())
