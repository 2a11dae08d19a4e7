"""Whether a run is as good as it was: `python experiments/quality_gate.py --run=quickstart --workdir=runs/quickstart`.

`quality_baselines.json` has for each run the metrics of its test split with a value, a tolerance and what is better:
`higher`, `lower`, or `near` where both sides are worse. A metric that is worse by more than the tolerance, that is no
number, or that is missing is a regression; one that is better by more is said, so that the baseline can be raised.
Exit status 1 where there is a regression. The value of a run moves with versions and devices by rounding alone.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

BASELINES = pathlib.Path(__file__).with_name("quality_baselines.json")
HIGHER, LOWER, NEAR = "higher", "lower", "near"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What a metric was, how far it may fall short of that, and in which direction it is better."""

    value: float
    tolerance: float
    better: str

    def __post_init__(self) -> None:
        if self.better not in (HIGHER, LOWER, NEAR):
            raise ValueError(f"better is {self.better!r}; choose one of {HIGHER}, {LOWER}, {NEAR}")
        if not (math.isfinite(self.value) and math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"value {self.value} and tolerance {self.tolerance} must be finite, the tolerance above 0")

    def gain(self, value: float) -> float:
        """How much better a value is than the baseline; negative where it is worse."""
        if self.better == NEAR:
            return -abs(value - self.value)
        return (value - self.value) * (1 if self.better == HIGHER else -1)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A line for each regression, and for each metric that is better than the baseline by more than its tolerance."""

    regressions: tuple[str, ...]
    gains: tuple[str, ...]


def read_baselines(run: str, path: pathlib.Path = BASELINES) -> dict[str, Baseline]:
    """The baselines of a run by metric; ValueError for a run that has none."""
    runs = json.loads(path.read_text())
    if run not in runs:
        raise ValueError(f"{path.name} has no run {run!r}; it has {', '.join(runs)}")
    return {metric: Baseline(**values) for metric, values in runs[run].items()}


def check(metrics: Mapping[str, Any], baselines: Mapping[str, Baseline]) -> Verdict:
    """`metrics` against baselines. None, as JSON has it for NaN, is no number; metrics without a baseline are free."""
    regressions, gains = [], []
    for name, baseline in baselines.items():
        value = metrics.get(name)
        of_baseline = f"the baseline {baseline.value:g} (+-{baseline.tolerance:g}, {baseline.better} is better)"
        if name not in metrics:
            regressions.append(f"{name} is missing; {of_baseline}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            regressions.append(f"{name} is {value}, which is no number; {of_baseline}")
        elif baseline.gain(value) < -baseline.tolerance:
            regressions.append(f"{name} is {value:.6f}, worse than {of_baseline}")
        elif baseline.gain(value) > baseline.tolerance:
            gains.append(f"{name} is {value:.6f}, better than {of_baseline}: raise it")
    return Verdict(tuple(regressions), tuple(gains))


def main() -> None:
    """Read a run's result, say what is worse or better, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="which of quality_baselines.json")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    result = json.loads((arguments.workdir / "result.json").read_text())
    verdict = check(result["test"] or {}, read_baselines(arguments.run))
    print("\n".join((*verdict.regressions, *verdict.gains)) or "as good as it was")
    sys.exit(1 if verdict.regressions else 0)


if __name__ == "__main__":
    main()
