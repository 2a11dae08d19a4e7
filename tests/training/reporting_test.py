"""Tests `dlrm_jax/training/reporting.py`."""

import json
import os
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from dlrm_jax.config import ConfigError
from dlrm_jax.training import reporting

NAN = float("nan")


def write_lines(workdir, *steps: int, resume_step: int = 0) -> None:
    with reporting.MetricsLog(workdir, resume_step) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1 / step})


def steps_in(workdir) -> list[int]:
    return [line["step"] for line in reporting.read_metrics(workdir)]


def strict_json(text: str):
    """Parses as JSON is defined, without Python's NaN and Infinity."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_json_file_has_null_for_what_is_not_finite(tmp_path, value):
    path = tmp_path / "result.json"
    reporting.write_json_atomically(path, {"test": {"auc": value, "rows": (1, value)}, "step": 3})
    assert strict_json(path.read_text()) == {"test": {"auc": None, "rows": [1, None]}, "step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_json_file_stays_whole_when_writing_fails(tmp_path):
    path = tmp_path / "result.json"
    reporting.write_json_atomically(path, {"step": 1})
    with pytest.raises(TypeError):
        reporting.write_json_atomically(path, {"step": object()})
    assert strict_json(path.read_text()) == {"step": 1}


def test_log_line_is_on_disk_at_once_and_valid_json(tmp_path, capfd):
    with reporting.MetricsLog(tmp_path, 0) as log:
        log.write(5, "val", {"loss": 0.5, "auc": NAN, "num_samples": 7})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert strict_json(text) == {"step": 5, "split": "val", "loss": 0.5, "auc": None, "num_samples": 7}
    assert capfd.readouterr() == ("", "")


def test_resume_drops_later_lines_and_appends(tmp_path):
    write_lines(tmp_path, 1, 2, 3)
    write_lines(tmp_path, 3, 4, resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_resume_drops_a_half_written_last_line(tmp_path):
    write_lines(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    write_lines(tmp_path, 3, resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_run_killed_while_resuming_keeps_its_lines(tmp_path, monkeypatch):
    write_lines(tmp_path, 1, 2)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            reporting.MetricsLog(tmp_path, 1)
    assert steps_in(tmp_path) == [1, 2]


def test_events_hold_the_finite_values_under_split_and_name(tmp_path):
    with reporting.MetricsLog(tmp_path, 0) as log:
        log.write(5, "val", {"loss": 0.5, "auc": NAN})
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"val/loss" in events and b"val/auc" not in events


def test_table_is_aligned_and_ends_in_the_optimum():
    results = {"val": None, "test": {"auc": 0.75, "log_loss": NAN, "num_samples": 1234567}}
    header, val, test, optimum = reporting.format_table(results, {"auc": 0.8, "log_loss": 0.4}).splitlines()
    assert len({len(line) for line in (header, val, test, optimum)}) == 1
    assert header.split() == ["split", *reporting.METRIC_COLUMNS]
    assert val.split() == ["val", *"-" * 8]
    assert test.split() == ["test", "0.75000", *"-" * 6, "1,234,567"]
    assert optimum.split()[:3] == ["optimum", "0.80000", "0.40000"]


def test_table_without_an_optimum_has_no_such_row():
    assert len(reporting.format_table({"test": {"auc": 0.75}}).splitlines()) == 2


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws curves.png of the given lines; returns the axes of the loss and of the AUC."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))

    def draw_lines(lines, optimum=None):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        reporting.plot_curves(tmp_path, optimum)
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes

    return draw_lines


def curves(axes) -> dict[str, list]:
    return {line.get_label(): list(map(float, line.get_ydata())) for line in axes.lines}


def test_curves_show_train_val_and_optimum(draw):
    train = [{"step": step, "split": "train", "loss": 1 / step} for step in (1, 2, 4)]
    val = [{"step": 2, "split": "val", "loss": 0.75, "auc": 0.7}, {"step": 4, "split": "val", "loss": None, "auc": 0.8}]
    loss_axes, auc_axes = draw([*train, *val], {"auc": 0.9, "log_loss": 0.25})
    assert curves(loss_axes) == {"train": [1, 0.5, 0.25], "val": [0.75], "optimum": [0.25, 0.25]}
    assert curves(auc_axes) == {"val": [0.7, 0.8], "optimum": [0.9, 0.9]}
    assert [axes.get_ylabel() for axes in (loss_axes, auc_axes)] == ["loss", "AUC"]
    assert {axes.get_xlabel() for axes in (loss_axes, auc_axes)} == {"step"}
    assert loss_axes.lines[1].get_color() == auc_axes.lines[0].get_color()


def test_curves_mark_a_single_point(draw):
    loss_axes, _ = draw([{"step": 1, "split": "train", "loss": 0.5}])
    assert loss_axes.lines[0].get_marker() == "o"


@pytest.mark.parametrize("lines", [[], [{"step": 1, "split": "val", "loss": None, "auc": None}]])
def test_curves_of_a_run_without_numbers_are_drawn_empty(draw, lines):
    assert [curves(axes) for axes in draw(lines)] == [{}, {}]


def test_versions_name_what_a_result_depends_on():
    found = reporting.versions()
    assert found["backend"] == "cpu" and found["jax"] and found["python"]
    assert {"dlrm_jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "device"} <= set(found)


def test_version_of_a_missing_package_is_none(monkeypatch):
    def missing(package):
        raise reporting.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(reporting.metadata, "version", missing)
    assert reporting.versions()["dlrm_jax"] is None


def test_progress_without_a_terminal_is_plain_lines_some_seconds_apart(capfd):
    with reporting.Progress(num_steps=3, start_step=0, batch_size=10) as bar:
        for step in (1, 2, 3):
            bar.update(step, 0.25, 40.0, {})
    out, err = capfd.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    (line,) = err.splitlines()
    assert line.startswith("step 3/3 ") and "samples/s" in line and "loss 0.2500" in line and line.endswith("0 s left")


def test_progress_on_a_terminal_is_a_bar_that_counts_from_the_resumed_step(capfd, monkeypatch):
    monkeypatch.setattr(reporting.sys.stderr, "isatty", lambda: True)
    with reporting.Progress(num_steps=4, start_step=2, batch_size=10) as bar:
        bar.update(3, 0.5, 40.0, {})
        bar.update(4, 0.25, 40.0, {})
    err = capfd.readouterr().err
    assert "4/4" in err and "samples/s, loss 0.2500" in err and "0/4" not in err


def test_progress_shows_no_loss_before_one_was_read(capfd):
    with reporting.Progress(num_steps=1, start_step=0, batch_size=10) as bar:
        bar.update(1, float("nan"), 40.0, {})
    err = capfd.readouterr().err
    assert "samples/s" in err and "loss" not in err and "nan" not in err


def test_bar_counts_steps_not_dispatches(capfd, monkeypatch):
    monkeypatch.setattr(reporting.sys.stderr, "isatty", lambda: True)
    with reporting.Progress(num_steps=8, start_step=0, batch_size=10) as bar:
        for step in (4, 8):
            bar.update(step, 0.25, 40.0, {})
    assert "8/8" in capfd.readouterr().err


def test_a_full_disk_names_the_metrics_file_and_what_to_do(tmp_path, monkeypatch):
    with reporting.MetricsLog(tmp_path, 0) as log:
        file = log._file
        full = SimpleNamespace(name=file.name, write=lambda text: (_ for _ in ()).throw(OSError(28, "No space left")))
        log._file = full
        with pytest.raises(ConfigError, match=r"cannot write .*metrics\.jsonl: No space left; .* goes on"):
            log.write(1, "train", {"loss": 0.5})
        log._file = file


def test_two_who_write_one_file_do_not_meet(tmp_path, monkeypatch):
    """As two evaluations of a workdir that end at once: each replaces what it wrote itself."""
    path, replace = tmp_path / "result.json", os.replace

    def after_another(source, target):
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        reporting.write_json_atomically(path, {"step": 1})
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_another)
    reporting.write_json_atomically(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 2} and len(list(tmp_path.iterdir())) == 1


def test_progress_before_a_timed_step_says_no_speed_and_no_end(capfd):
    with reporting.Progress(num_steps=1, start_step=0, batch_size=10) as bar:
        bar.update(1, 0.25, None, {})
    assert capfd.readouterr().err == "step 1/1  loss 0.2500\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_time_left_is_by_the_rate_it_is_given(capfd, monkeypatch, terminal):
    """Not by the time since it began, most of which compiled the step: the first line said 28318 s."""
    monkeypatch.setattr(reporting.sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(reporting, "_PLAIN_PROGRESS_SECONDS", -1.0)
    with reporting.Progress(num_steps=2000, start_step=0, batch_size=10) as bar:
        bar.update(1000, 0.25, 500.0, {"input_wait_fraction": 0.25, "host_wait_fraction": 0.009})
    assert "500 samples/s, 25% waiting for input, loss 0.2500, 20 s left" in capfd.readouterr().err


PREDICTED = {"seconds": 0.000695, "bytes": 1_200_000, "hardware": "cpu"}


def test_cost_says_what_the_prediction_is_of():
    text = reporting.format_cost({"predicted": PREDICTED, "measured": {"seconds": 0.004462, "bytes": 1_300_000}})
    first, second = text.splitlines()
    assert first == "predicted 0.695 ms a step, 1.2 MB a device; measured 4.462 ms a step, 1.3 MB a device"
    assert "at the rates listed for cpu" in second and "--calibrate" in second and len(second) < 250
    unmeasured = reporting.format_cost({"predicted": PREDICTED, "measured": {"seconds": None, "bytes": None}})
    assert unmeasured == "predicted 0.695 ms a step, 1.2 MB a device; measured -, -"


def test_a_result_without_a_timed_step_keeps_the_speed_of_the_one_before(tmp_path):
    assert reporting.earlier(tmp_path, "result.json") == {}
    (tmp_path / "result.json").write_text("{")
    assert reporting.earlier(tmp_path, "result.json") == {}
    before = {
        "samples_per_second": 5.0,
        "input_wait_fraction": 0.5,
        "host_wait_fraction": 0.1,
        "step_cost": {"measured": 1},
        "step": 3,
    }
    reporting.write_json_atomically(tmp_path / "result.json", before)
    untimed = {
        "step": 4,
        "samples_per_second": None,
        "input_wait_fraction": None,
        "host_wait_fraction": None,
        "step_cost": {"measured": None},
    }
    assert reporting.with_earlier_speed(untimed, reporting.earlier(tmp_path, "result.json")) == before | {"step": 4}
    timed = untimed | {"samples_per_second": 6.0}
    assert reporting.with_earlier_speed(timed, before) == timed
