"""TPU pods on a laptop: the real step, compiled by libtpu, without a TPU. Skips where libtpu is not installed."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from dlrm_jax.config import ConfigError, LossConfig, TableConfig
from dlrm_jax.data.generate.synthetic import Log, Spec
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.planning.cost import Load
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.planning.planner import Setting
from dlrm_jax.training.topology import Compiled, Windows, compile_report, devices, other_libtpu, parse_topology
from tests.helpers import ROOT, optimizer, tiny_model

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")

SMALL = (
    *("--dataset=synthetic", "--num_dense=13", "--bottom_mlp=64,{dim}", "--top_mlp=64,1", "--batch_size=2048"),
    *("--hotness=3,1,1,1", "--embedding_dim={dim}", "--table_sizes={rows},300000,1000,3", "--exchange_capacity=200"),
)

OTHERS = ("column_wise", "data_parallel", "table_row_wise")


def compiled(tmp_path, *flags: str) -> dict:
    path = tmp_path / "plan.json"
    command = [sys.executable, "-m", "dlrm_jax.plan", f"--json={path}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "XLA's numbers for a chip" in done.stdout
    return json.loads(path.read_text())


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_the_command_says_what_to_install():
    with pytest.raises(ConfigError, match=r'pip install "\.\[tpu-plan\]"'):
        devices(parse_topology("v5e:2x4"))


@needs_libtpu
@pytest.mark.parametrize("dim", [16, pytest.param(32, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize(
    "sharding", ["row_wise", "table_wise", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
)
def test_no_temporary_grows_with_the_tables(tmp_path, dim, sharding):
    """The layout trap: rows narrower than 128 lanes would make XLA lay out the table anew in every step."""
    temporaries, arguments = [], []
    for rows in (4_000_000, 16_000_000):
        flags = [flag.format(dim=dim, rows=rows) for flag in SMALL]
        report = compiled(tmp_path, *flags, f"--sharding={sharding}", "--topology=v5e:2x4")["compiled"]
        temporaries.append(report["temporaries"])
        arguments.append(report["arguments"])
    assert abs(report["predicted_held"] / report["held"] - 1) < 0.05
    grown = arguments[1] - arguments[0]
    assert grown > 0.99 * 12_000_000 * dim * 4 / 8
    assert temporaries[1] - temporaries[0] < grown / 4


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("model", "pod"), [("dlrm", "v5e:8x8"), ("dcnv2", "v5p:4x4x4"), ("dcnv2", "v5p:8x8x16")])
def test_mlperf_on_a_pod_as_predicted(tmp_path, model, pod):
    values = compiled(tmp_path, f"--flagfile=experiments/shape_mlperf_{model}.flags", f"--topology={pod}")
    report = values["compiled"]
    assert report["fits"] and sum(report["sent"].values()) == sum(values["cost"]["sent"].values())
    assert abs(report["predicted_held"] / report["held"] - 1) < 0.05


@pytest.fixture(scope="module")
def of_windows():
    """What compiles the step of a small model for four chips: of a batch, or of some windows."""
    shape, topology = MeshShape(1, 4), parse_topology("v5e:2x2")
    tables = tuple(TableConfig(name, rows, 64) for name, rows in (("user", 100_000), ("item", 7), ("flag", 1)))
    model = tiny_model(tables=tables, bottom_mlp=(5, 64))

    def report(windows: Windows | None) -> Compiled:
        load = Load(512, resident_rows=windows.rows if windows is not None and windows.maker is None else 0)
        setting = Setting(model, optimizer("rowwise_adagrad"), shape, load, HARDWARE["v5e"], packed=True)
        return compile_report(setting, LossConfig(), setting.cost("row_wise"), topology, windows)

    return functools.cache(report)


@needs_libtpu
def test_a_step_of_a_window_is_compiled_as_that_of_a_batch(of_windows):
    """Of a window that travels: its batch is cut on the chip, without a loop over rows, and tables lie as before."""
    plain, windowed = of_windows(None), of_windows(Windows(32))
    assert windowed.serial_loops == plain.serial_loops == 0 and windowed.sent == plain.sent
    assert windowed.temporaries < 1.5 * plain.temporaries and windowed.arguments > plain.arguments


@needs_libtpu
def test_rows_that_stay_are_taken_one_by_one_and_copied_by_no_step(of_windows):
    """Their columns lie in tiles, and a batch of them is gathered without a loop, whatever else is there."""
    plain, half, whole = of_windows(None), of_windows(Windows(32, 500_000)), of_windows(Windows(32, 1_000_000))
    assert whole.serial_loops == 0 and whole.sent == plain.sent
    grown, predicted = whole.arguments - half.arguments, whole.predicted.bytes_held - half.predicted.bytes_held
    assert abs(predicted / grown - 1) < 0.001 and abs(whole.predicted.bytes_held / whole.held - 1) < 0.05
    assert abs(whole.temporaries - half.temporaries) < grown / 100 and whole.temporaries < 1.5 * plain.temporaries


@needs_libtpu
@pytest.mark.exhaustive
def test_rows_are_made_on_a_chip_without_a_loop(of_windows):
    log = Log(Spec(3, (100_000, 7, 7, 1), (1, 1, 3, 2)), 0)
    plain, made = of_windows(None), of_windows(Windows(32, 1_000_000, log))
    assert made.serial_loops == 0 and made.sent == plain.sent
    assert made.temporaries < 1.5 * plain.temporaries and made.arguments < 1.01 * plain.arguments


@needs_libtpu
def test_a_shape_that_libtpu_does_not_know_is_one_line():
    with pytest.raises(ConfigError, match=r"libtpu does not know the topology v5e:3x5"):
        devices(parse_topology("v5e:3x5"))


def test_a_libtpu_of_another_release_is_one_line(tmp_path, monkeypatch):
    """A package that is not what JAX asks for; whatever goes wrong with it, the line says what to install."""
    (tmp_path / "libtpu-0.0.3.dist-info").mkdir()
    (tmp_path / "libtpu-0.0.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: libtpu\nVersion: 0.0.3\n"
    )
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").write_text("def get_library_path():\n    return '/nowhere/libtpu.so'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert other_libtpu().startswith("libtpu 0.0.3 does not belong to jax ")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-m", "dlrm_jax.plan", "--dataset=synthetic", "--topology=v5e:2x2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: libtpu 0.0.3 does not belong to jax ") and done.stderr.count("\n") == 1
    assert 'pip install --upgrade ".[tpu-plan]" in the checkout of dlrm_jax (it ended in: ' in done.stderr


def test_the_libtpu_that_jax_asks_for_is_its_own(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"'])
    for found, other in (("0.0.42", ""), ("0.0.42.1", ""), ("0.0.4", "0.0.42"), ("0.0.421", "0.0.42")):
        monkeypatch.setattr(metadata, "version", lambda name, found=found: found)
        assert other in other_libtpu() and bool(other) == bool(other_libtpu())
