"""TPU pods on a laptop: the real step, compiled by libtpu, without a TPU. Skips where libtpu is not installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.sharding.topology import devices, parse_topology
from tests.helpers import ROOT

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
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
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


@needs_libtpu
def test_a_shape_that_libtpu_does_not_know_is_one_line():
    with pytest.raises(ConfigError, match=r"libtpu does not know the topology v5e:3x5"):
        devices(parse_topology("v5e:3x5"))
