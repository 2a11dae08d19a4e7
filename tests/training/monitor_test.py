"""Tests `dlrm_jax/training/monitor.py`: one clock, that of the steps alone, for the progress and for the result."""

from types import SimpleNamespace

import pytest

from dlrm_jax.training import loop, monitor, reporting
from dlrm_jax.training.monitor import Clock, Speed
from tests.training.resume_test import CONFIG


@pytest.fixture
def at(monkeypatch):
    """A clock whose time, time waited for input and time spent compiling the test sets."""
    now = SimpleNamespace(seconds=100.0, wait_seconds=0.0, host_seconds=0.0, compile_seconds=0.0)
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now.seconds)
    return now


def test_neither_the_first_step_nor_any_compilation_counts(at):
    clock, speed = Clock(at, 10), Speed()
    at.seconds += 1000  # Most of it compiles.
    assert clock.rate(speed, 1) is None
    clock.lap(speed, 1)
    assert clock.rate(speed, 1) is None and speed.samples == 0
    clock.resume()
    at.seconds += 2
    assert clock.rate(speed, 5) == 20.0
    at.seconds, at.compile_seconds = at.seconds + 50, 50.0  # Another executable, in the midst of it.
    assert clock.rate(speed, 5) == 20.0
    clock.lap(speed, 5)
    at.seconds += 7  # An evaluation.
    assert clock.rate(speed, 5) == speed.summary()["samples_per_second"] == 20.0
    clock.resume()
    at.seconds, at.wait_seconds, at.host_seconds = at.seconds + 3, 1.0, 0.5
    shares = {"input_wait_fraction": 0.2, "host_wait_fraction": 0.1}
    assert clock.waits(speed) == shares
    clock.lap(speed, 11)
    assert speed.summary() == {"samples_per_second": 20.0} | shares and clock.waits(speed) == shares


def test_the_last_progress_line_says_the_speed_of_the_result_and_what_takes_long_is_said_first(tmp_path, capfd, caplog):
    with caplog.at_level("INFO", logger="dlrm_jax"):
        result = loop.train_and_evaluate(CONFIG, tmp_path)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("step 60/60  ") and last.endswith(", 0 s left")
    assert f" {result['samples_per_second']:,.0f} samples/s" in last
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "loading planted" and "compiling the training step" in messages
    text = reporting.format_cost(result["step_cost"])
    assert "at the rates listed for cpu" in text
