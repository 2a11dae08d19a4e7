"""Tests `dlrm_jax/compat.py` and promise 1: recorded trajectories of the reference replay."""

import pathlib

import numpy as np
import pytest

from dlrm_jax import compat
from dlrm_jax.config import ConfigError, HiddenConfig
from experiments.replay_reference import main as replay_main
from tests.helpers import ROOT, SHARED, tiny_model

FIXTURES = sorted((ROOT / "tests" / "fixtures").glob("*.npz"))
TRAJECTORIES = [path for path in FIXTURES if "crossnet" not in path.name]
COVERED = [
    "tiny_default",
    "dot_mse_sgd",
    "dot_bce_sgd",
    "dotself_bce",
    "cat_bce",
    "wbce",
    "bce_thresh",
    "adagrad",
    "rwsadagrad",
    "lrsched",
    "wpool_fixed",
    "wpool_learned",
    "fixed_hot",
    "qr_mult",
    "qr_add",
    "qr_concat",
    "md",
]


def recording(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.golden
@pytest.mark.parametrize("path", TRAJECTORIES, ids=lambda path: path.stem)
def test_trajectory_replays(path):
    result = compat.replay(recording(path))
    assert result.passed, result


@pytest.mark.golden
@pytest.mark.parametrize("name", COVERED)
def test_shared_trajectory_replays(name):
    path = SHARED / "goldens" / f"{name}.npz"
    if not path.exists():
        pytest.skip("the recorded trajectories are not beside this checkout")
    result = compat.replay(recording(path))
    assert result.passed, result


def test_replay_notices_a_wrong_weight():
    arrays = recording(TRAJECTORIES[0])
    arrays["final/bot_l.0.weight"] = arrays["final/bot_l.0.weight"] + 1e-4
    assert not compat.replay(arrays).passed


def test_replay_notices_a_nan():
    arrays = recording(TRAJECTORIES[0])
    arrays["final/bot_l.0.bias"] = arrays["final/bot_l.0.bias"] * np.nan
    assert not compat.replay(arrays).passed


@pytest.mark.parametrize("name", ["wpool_learned", "cat_bce", "qr_mult", "qr_concat", "md"])
def test_state_round_trips(name):
    path = ROOT / "tests" / "fixtures" / f"{name}.npz"
    path = path if path.exists() else SHARED / "goldens" / f"{name}.npz"
    if not path.exists():
        pytest.skip("the recorded trajectories are not beside this checkout")
    arrays = recording(path)
    init = {key.removeprefix("init/"): value for key, value in arrays.items() if key.startswith("init/")}
    operation = name.removeprefix("qr_") if name.startswith("qr_") else "mult"
    state = compat.load_reference_state(init, qr_operation=operation)
    saved = compat.save_reference_state(compat.infer_model(init, qr_operation=operation), state)
    assert saved.keys() == init.keys()
    for key in init:
        np.testing.assert_array_equal(saved[key], init[key], err_msg=key)


def test_hidden_layers_that_the_reference_has_not_are_refused():
    model = tiny_model(top_hidden=HiddenConfig(norm="batch"))
    with pytest.raises(ConfigError, match=r"are products and ReLUs, not HiddenConfig\(.*norm='batch'"):
        compat.save_reference_state(model, None)


def test_embedded_numbers_which_the_reference_has_not_are_refused():
    with pytest.raises(ConfigError, match="no embedded numbers"):
        compat.save_reference_state(tiny_model(embed_numbers=True), None)


def test_weights_of_an_unknown_kind_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"cannot load 'emb_l\.0\.weight_x': known are embedding tables, plain, quot"):
        compat.load_reference_state({"emb_l.0.weight_x": np.zeros((2, 2))})


@pytest.mark.parametrize("flag", ["--mlperf-grad-accum-iter=2", "--no-such-flag"])
def test_unsupported_reference_flag_is_named(flag):
    with pytest.raises(ConfigError, match=flag):
        compat.parse_reference_flags(["--learning-rate=0.1", flag])


def test_script_prints_a_line_a_file_and_fails_beyond_tolerance(tmp_path, capsys):
    good = TRAJECTORIES[0]
    arrays = recording(good)
    arrays["final/bot_l.0.weight"] = arrays["final/bot_l.0.weight"] + 1
    bad = tmp_path / "bad.npz"
    np.savez(bad, **arrays)
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros(3))
    assert replay_main([str(good)]) == 0
    assert f"{good.stem} loss_diff=" in capsys.readouterr().out
    assert replay_main([str(good), str(bad), str(other), str(tmp_path / "missing.npz")]) == 1
    output = capsys.readouterr()
    assert "bad loss_diff=" in output.out and "FAIL" in output.out
    assert "not a recorded trajectory" in output.err and "missing error" in output.err
