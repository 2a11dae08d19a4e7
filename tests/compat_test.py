"""Tests `dlrm_jax/compat` and promise 1: recorded trajectories of the reference replay."""

import pathlib
import re

import numpy as np
import pytest

from dlrm_jax import compat
from dlrm_jax.cli.flags import run_settings
from dlrm_jax.config import ConfigError, HiddenConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.training.step import logits
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
@pytest.mark.sample(3)
def test_trajectory_replays(path):
    result = compat.replay(recording(path))
    assert result.passed, result


@pytest.mark.golden
@pytest.mark.parametrize("name", COVERED)
@pytest.mark.sample(3)
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


def torchrec_state(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three tables of 4 columns, two numbers, as TorchRec's DLRM names and shapes them."""

    def layer(name: str, width: int, inputs: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": rng.normal(size=(width, inputs)), f"{name}.bias": rng.normal(size=width)}

    state = {}
    for i in range(3):
        state[f"sparse_arch.embedding_bag_collection.embedding_bags.t_cat_{i}.weight"] = rng.normal(size=(5 + i, 4))
    state |= layer("dense_arch.model._mlp.0._linear", 5, 2) | layer("dense_arch.model._mlp.1._linear", 4, 5)
    state |= layer("over_arch.model.0._mlp.0._linear", 3, 4 + 6) | layer("over_arch.model.1", 1, 3)
    return {f"model.{name}": array.astype(np.float32) for name, array in state.items()}


def torchrec_logits(state: dict[str, np.ndarray], dense_BxN: np.ndarray, ids_BxF: np.ndarray) -> np.ndarray:
    """Plainly, as torchrec/models/dlrm.py: pairs by the upper triangle, row after row."""
    state = {name.removeprefix("model."): array for name, array in state.items()}
    x = dense_BxN
    for i in range(2):
        name = f"dense_arch.model._mlp.{i}._linear"
        x = np.maximum(x @ state[f"{name}.weight"].T + state[f"{name}.bias"], 0)
    tables = [name for name in state if "embedding_bags" in name]
    vectors = np.stack([x, *(state[name][ids_BxF[:, i]] for i, name in enumerate(tables))], axis=1)
    rows, columns = np.triu_indices(vectors.shape[1], 1)
    products = np.einsum("bij,bkj->bik", vectors, vectors)[:, rows, columns]
    name = "over_arch.model.0._mlp.0._linear"
    hidden = np.concatenate([x, products], axis=1) @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    return (np.maximum(hidden, 0) @ state["over_arch.model.1.weight"].T + state["over_arch.model.1.bias"])[:, 0]


def test_torchrecs_weights_give_its_logits():
    rng = np.random.default_rng(0)
    theirs = torchrec_state(rng)
    dense_BxN = rng.normal(size=(6, 2)).astype(np.float32)
    ids_BxF = rng.integers(0, 5, (6, 3)).astype(np.int32)
    arrays = compat.from_torchrec(theirs)
    model, state = compat.infer_model(arrays), compat.load_reference_state(arrays)
    ones_B = np.ones(6, np.float32)
    ours = logits(model, state, Batch(dense_BxN, ids_BxF, label_B=ones_B, weight_B=ones_B))
    np.testing.assert_allclose(ours, torchrec_logits(theirs, dense_BxN, ids_BxF), rtol=1e-5, atol=1e-5)


def test_another_model_of_torchrec_is_refused():
    theirs = torchrec_state(np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"'inter_arch\.crossnet\.bias\.0': it is not of TorchRec's DLRM"):
        compat.from_torchrec(theirs | {"model.inter_arch.crossnet.bias.0": np.zeros(4)})
    with pytest.raises(ConfigError, match="a table or an MLP is missing"):
        compat.from_torchrec({"over_arch.model.1.weight": np.zeros((1, 3))})
    name = "model.over_arch.model.0._mlp.0._linear.weight"
    with pytest.raises(ConfigError, match="takes 9 numbers; 3 tables and their products of pairs are 10"):
        compat.from_torchrec(theirs | {name: theirs[name][:, :9]})


def test_every_flag_of_the_reference_is_known_and_ours_exist():
    """The table of docs/REFERENCE.md: no flag twice, and each of ours that it names is one."""
    names = [flag.name for flag in compat.REFERENCE_FLAGS]
    assert len(set(names)) == len(names)
    ours = set(run_settings()) | {"workdir", "schema", "input", "process_id"}
    for flag in compat.REFERENCE_FLAGS:
        for word in re.findall(r"--(?:no(?=shuffle))?(\w+)", flag.ours):
            assert word in ours, (flag.name, word)


def test_a_flag_that_changes_no_number_is_passed_over_and_another_refused():
    known = ["--mini-batch-size=8", "--print-freq", "3", "--optimizer=adagrad", "--arch-interaction-itself"]
    flags = compat.parse_reference_flags(known)
    assert (flags.optimizer, flags.arch_interaction_itself, flags.learning_rate) == ("adagrad", True, 0.01)
    for unknown in ("--mlperf-logging", "--unheard-of=1"):
        with pytest.raises(ConfigError, match=f"reference flag {unknown} is not supported"):
            compat.parse_reference_flags([*known, unknown])
