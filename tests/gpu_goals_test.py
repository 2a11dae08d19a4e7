"""Tests what experiments/gpu_goals.py does about time limits and failures, without measuring."""

import subprocess
import sys

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
from experiments.gpu_goals import Failed, Goal, Unit, measured, row


def unit(name, limit=10.0, **changes):
    def measure(seconds):
        if name == "slow":
            raise subprocess.TimeoutExpired("command", seconds)
        if name == "broken":
            raise Failed("no such GPU")
        return {"ms": 2.0, "M samples/s": 1.5}

    return Unit("part", name, limit, measure, changes.get("goals", (Goal("ms", at_most=2.0),)))


def test_each_result_is_kept_as_it_comes_and_none_stops_the_rest(capsys):
    kept = []
    units = [
        unit("slow", 3.0),
        unit("broken"),
        unit("good", goals=(Goal("ms", 2.0), Goal("M samples/s", at_least=1.8))),
    ]
    found = measured(units, 60, lambda so_far: kept.append(len(so_far)))
    assert kept == [1, 2, 3]
    assert [record.get("failed") for record in found] == ["took more than 3 s", "no such GPU", None]
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == row(units[-1], found[-1])
        == ("| good | ms **2**, M samples/s **1.5** | ms at most 2: met; M samples/s at least 1.8: missed |")
    )


def test_nothing_is_begun_that_cannot_end_in_time():
    (record,) = measured([unit("good")], 5, lambda so_far: None)
    assert record["failed"] == "not begun: the time was up"
