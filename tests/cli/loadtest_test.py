"""The load test: an open loop, percentiles of what was due, and the highest rate that holds a limit."""

import json

import numpy as np
import pytest

from dlrm_jax.serving.http import load_generator
from dlrm_jax.serving.http.load_generator import Run, best_of, find_max_qps, format_runs
from tests.forked import run
from tests.helpers import tiny_model
from tests.server_process import running
from tests.serving_helpers import export_tiny


def outcome(qps: float, latency: list[float], status: list[int]) -> Run:
    return Run(qps, 1.0, np.linspace(0, 1, len(latency)), np.array(latency), np.array(status))


def test_a_summary_separates_served_refused_and_failed():
    summary = outcome(4, [0.001, 0.002, 0.003, 0.5, np.nan], [200, 200, 200, 429, 0]).summary()
    assert (summary["requests"], summary["refused"], summary["failed"], summary["served_qps"]) == (5, 1, 1, 3.0)
    assert summary["p50_ms"] == 2.0 and summary["refused_p99_ms"] == 500.0
    assert "p99.9_ms" in format_runs([outcome(4, [0.1], [200])])


def test_the_highest_rate_is_found_from_both_sides(monkeypatch):
    asked = []

    def fake(target, bodies, qps, seconds, connections=64, seed=0):
        asked.append(qps)
        return outcome(qps, [0.01 if qps <= 777 else 0.1] * 100, [200] * 100)

    monkeypatch.setattr(load_generator, "run", fake)
    for begin in (100.0, 5000.0):
        asked.clear()
        best = best_of(find_max_qps(None, [], begin, 0.025, 1.0, 4, 0), 0.025)
        assert 777 / 1.07 <= best.qps <= 777 and len(asked) < 30
    never = best_of(find_max_qps(None, [], 5.0, 0.001, 1.0, 4, 0), 0.001)
    assert never is None


@pytest.mark.end_to_end
@pytest.mark.exhaustive
def test_the_command_asks_at_its_rate_and_draws(tmp_path):
    export_tiny(tmp_path / "model", tiny_model())
    with running(tmp_path / "model", "--batch_sizes=1,16") as server:
        url = f"--url=http://127.0.0.1:{server.port}"
        for api in ("binary", "json"):
            flags = ["--qps=100", "--candidates=3", "--seconds=1", f"--api={api}"]
            finished = run("loadtest", url, *flags, f"--picture={tmp_path}/a.png", f"--json={tmp_path}/a.json")
            assert finished.returncode == 0, finished.stderr
            facts = json.loads(finished.stdout.strip().splitlines()[-1])
            assert facts["requests"] == 100 and facts["failed"] == facts["refused"] == 0 and facts["p50_ms"] > 0
            assert json.loads((tmp_path / "a.json").read_text()) == facts
            assert (tmp_path / "a.png").stat().st_size > 1000
    gone = run("loadtest", url, "--seconds=1")
    assert gone.returncode == 1 and "no model to ask" in gone.stderr and "Traceback" not in gone.stderr
