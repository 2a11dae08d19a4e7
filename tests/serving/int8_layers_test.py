"""Layers of 8 bits in the C++ scorer: their arithmetic, what they may change, and who may use them."""

import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from dlrm_jax.api.exporting import export
from dlrm_jax.config import ConfigError, FeatureConfig, LossConfig, TableConfig
from dlrm_jax.serving.artifact import int8_layers, native
from dlrm_jax.serving.artifact.export import by_the_program, export_model, measuring_int8
from dlrm_jax.serving.artifact.export_delta import differing, export_delta
from dlrm_jax.serving.artifact.loaded import load
from dlrm_jax.serving.artifact.native import NativeCpu, native_int8
from dlrm_jax.serving.artifact.store import open_alone, open_version
from tests.helpers import random_batch, tiny_model
from tests.server_process import running
from tests.serving.native_serving_test import export_random, scores
from tests.serving_helpers import export_tiny, learned, lively_state, pieces_of, random_dataset
from tests.tables.native_test import needs_compiler

VECTORS = {
    "num_dense": 0,
    "bottom_mlp": (),
    "tables": tuple(TableConfig(f"t{i}", 9, 33) for i in range(3)),
    "features": tuple(FeatureConfig(f"f{i}", f"t{i}") for i in range(3)),
    "interaction": "cat",
}
"""The top MLP takes 99 numbers, which are rows of tables."""
WIDE = tiny_model(bottom_mlp=(70, 70, 4), top_mlp=(80, 70, 1))
LEAVES = ("kernel", "bias")
pytestmark = needs_compiler


def plain_layer(x_BxI, kernel_IxO):
    """x W of 8 bits, by the meaning that int8_layers.py gives."""
    low_B, high_B = np.minimum(x_BxI.min(axis=1), 0), np.maximum(x_BxI.max(axis=1), 0)
    scale_Bx1 = ((high_B - low_B) / 255)[:, None]
    zero_Bx1 = np.rint(-low_B[:, None] / scale_Bx1)
    code_BxI = np.clip(np.rint(x_BxI / scale_Bx1) + zero_Bx1, 0, 255)
    scale_O = np.abs(kernel_IxO).max(axis=0) / 127
    return scale_Bx1 * scale_O * ((code_BxI - zero_Bx1) @ np.rint(kernel_IxO / scale_O))


def weights_of(version):
    """Arrays of a version by the names of weights, and of tables."""
    found = {}
    for name, stored in json.loads((version.directory / "weights.json").read_text()).items():
        for one, file in zip(stored.get("tables") or [name], stored["files"], strict=True):
            found[one] = np.load(version.directory / file)
    return found


def test_scores_are_those_of_whole_numbers(tmp_path):
    model = tiny_model(**VECTORS, top_mlp=(75, 1))
    version = export_random(tmp_path, model, "float32")
    batch, arrays = random_batch(model, 40), weights_of(version)
    ids_BxK = np.asarray(batch.ids_BxK)
    of_feature = [np.where(ids_BxK[:, [i]] >= 0, arrays[f"t{i}"][ids_BxK[:, i]], 0) for i in range(3)]
    (kernel, bias), (last, last_bias) = ([arrays[f"top_mlp/layer_{i}/{leaf}"] for leaf in LEAVES] for i in range(2))
    hidden = np.maximum(plain_layer(np.concatenate(of_feature, axis=1).astype(np.float64), kernel) + bias, 0)
    want = hidden @ last + last_bias
    for rows in (1, 2, 3, 40):
        got = scores(NativeCpu(version, int8=True), batch, slice(rows))[1]
        np.testing.assert_allclose(got, want[:rows, 0], atol=2e-5)
    assert np.abs(scores(NativeCpu(version), batch)[1] - want[:, 0]).max() > 1e-3  # It is not float32's.


@pytest.mark.parametrize(
    "changes",
    [
        {"bottom_mlp": (70, 130, 4), "top_mlp": (300, 90, 1), "num_dense": 65},
        VECTORS | {"top_mlp": (200, 70, 1), "interaction": "parallel_full_cross", "tower_mlp": (64, 40)},
        VECTORS | {"top_mlp": (64, 1), "interaction": "cross", "cross_rank": 64, "cross_layers": 2},
    ],
    ids=["dot", "full cross, tower", "cross"],
)
def test_scores_are_near_those_of_float32(tmp_path, changes):
    model = tiny_model(**changes)
    version = export_random(tmp_path, model, "float32")
    batch = random_batch(model, 101)
    want, engine = scores(NativeCpu(version), batch)[1], NativeCpu(version, int8=True)
    whole = scores(engine, batch)
    difference = np.abs(whole[1] - want).max() / np.ptp(want)
    assert 1e-5 < difference < 0.05
    for rows in (1, 2, 8, 9, 49):  # A row has the same bits in every batch.
        np.testing.assert_array_equal(scores(engine, batch, slice(rows)), whole[:, :rows])


def test_what_is_no_number_has_no_score(tmp_path):
    model = tiny_model(bottom_mlp=(70, 70, 4), num_dense=65)
    engine = NativeCpu(export_tiny(tmp_path, model), int8=True)
    batch = random_batch(model, 20)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        dense = np.array(batch.dense_BxN)
        dense[4, 64 * i // 2] = value  # In a register, and behind the last whole one.
        logit = engine.run(dense, np.asarray(batch.ids_BxK))[1]
        assert np.isnan(logit[4]), value
        assert np.isfinite(np.delete(logit, 4)).all()


def test_a_processor_without_the_instruction_gives_the_same_bits(tmp_path, monkeypatch):
    model = tiny_model(**VECTORS, top_mlp=(75, 1))
    version, batch = export_random(tmp_path, model, "float32"), random_batch(model, 40)
    want = scores(NativeCpu(version, int8=True), batch)
    plain = native._opened(("-U__AVX512VNNI__", "-U__AVXVNNI__"))
    assert not plain.dlrm_has_byte_products()
    monkeypatch.setattr(native, "_library", lambda: plain)
    np.testing.assert_array_equal(scores(NativeCpu(version, int8=True), batch), want)


def test_rows_of_zeros_and_columns_of_zeros_have_codes():
    assert (int8_layers.coded(np.zeros((3, 2), np.float32)).codes == 0).all()
    weights = int8_layers.coded(np.array([[0.5], [-1.27]], np.float32))
    assert weights.codes.tolist() == [[50], [-127]] and weights.sums.tolist() == [-77]
    assert weights.scales[0] == pytest.approx(0.01)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A version that was measured with int8 layers, the second; the first was not."""
    model_dir = tmp_path_factory.mktemp("measured")
    with mock.patch.object(int8_layers, "MOST_CHANGE", 0.1):  # A model at random ranks by next to nothing.
        export_random(model_dir, WIDE, "float32", measuring_int8(by_the_program), ("val", "test"))
    export_tiny(model_dir, WIDE)
    return model_dir


def test_a_version_says_what_int8_layers_change(measured):
    servable = load(measured, 1, make_engine=NativeCpu)
    changes = servable.version.manifest["int8_layers"]
    assert changes.keys() == {"val", "test"}
    assert 0 < max(map(abs, changes.values())) <= 0.1
    with np.load(servable.version.directory / "self_check.npz") as noted:
        by_float32, by_int8 = noted["probability"], noted["probability_int8"]
    assert 0 < np.abs(by_float32 - by_int8).max() < 0.1


def test_nothing_is_written_of_a_model_that_int8_layers_change(tmp_path):
    with pytest.raises(ConfigError, match="int8 layers move the AUC on test by"):
        export_random(tmp_path, WIDE, "float32", measuring_int8(by_the_program), ("test",))
    assert not list(tmp_path.glob("[0-9]*"))


@pytest.mark.parametrize(
    ("int8_auc", "said"),
    [
        (0.79989, r"int8 layers move the AUC on test by -0\.000110, from 0\.800000, and at most 0\.0001 is accepted"),
        (0.80011, r"on test by \+0\.000110"),
        (float("nan"), "on test by"),
    ],
)
def test_a_model_whose_auc_moves_is_not_exported(int8_auc, said):
    scores = {"val": None, "test": {"auc": 0.8}}
    with pytest.raises(ConfigError, match=said):
        int8_layers.changes_of_auc(scores, {"val": None, "test": {"auc": int8_auc}})


def test_a_small_change_of_auc_is_told_and_without_an_auc_nothing_can_be():
    scores = {"val": None, "test": {"auc": 0.8}}
    changes = int8_layers.changes_of_auc(scores, {"val": None, "test": {"auc": 0.80009}})
    assert changes == {"test": pytest.approx(9e-5)}
    with pytest.raises(ConfigError, match="no split has an AUC"):
        int8_layers.changes_of_auc({"test": {"auc": float("nan")}}, {"test": {"auc": 0.8}})


def test_who_was_not_measured_is_refused(measured):
    with pytest.raises(ConfigError, match="2: what int8 layers change of its AUC was not measured; export it with"):
        load(measured, 2, make_engine=native_int8)


def test_a_processor_without_the_instruction_is_told(measured, monkeypatch):
    monkeypatch.setattr(native._library(), "dlrm_has_byte_products", lambda: False)
    with pytest.raises(ConfigError, match="this processor has no VNNI instructions"):
        load(measured, 1, make_engine=native_int8)


def test_a_model_without_a_wide_layer_gains_nothing(tmp_path):
    with pytest.raises(
        ConfigError, match="no layer of this model has 64 inputs and 32 outputs, so that none has 8 bits"
    ):
        export_random(tmp_path, tiny_model(), "float32", measuring_int8(by_the_program))


def test_a_delta_is_applied_where_it_was_measured_too(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_layers, "MOST_CHANGE", 0.1)
    monkeypatch.setattr(native._library(), "dlrm_has_byte_products", lambda: True)
    state, data, loss = lively_state(WIDE), random_dataset(WIDE), LossConfig()
    measuring = {"evaluated": ("test",), "make_score": measuring_int8(by_the_program)}
    export_model(tmp_path, WIDE, loss, state.dense_params, pieces_of(WIDE, state), data, **measuring)
    servable = load(tmp_path, make_engine=native_int8)
    batch = tuple(map(np.asarray, vars(random_batch(WIDE, 20)).values()))[:2]
    for number, more in ((2, {"evaluated": ("test",)}), (3, measuring)):
        state = learned(state, WIDE, {"user": [1, 2]}, 0.5)
        parent = open_version(tmp_path, 1)
        rows_of = differing(pieces_of(WIDE, state), "float32")
        export_delta(tmp_path, parent, WIDE, loss, state.dense_params, rows_of, data, **more)
        change, before = servable.changed_by(open_alone(tmp_path, number)), servable.score(*batch).logit
        if number == 2:
            with pytest.raises(ConfigError, match="probability_int8 is not there, which export --int8_layers notes"):
                change()
            np.testing.assert_array_equal(servable.score(*batch).logit, before)
    after = change()
    want = NativeCpu(open_version(tmp_path, 3), int8=True).run(*batch)[1]
    np.testing.assert_array_equal(after.score(*batch).logit, want)


@pytest.mark.end_to_end
def test_a_server_scores_by_int8_layers_what_was_measured(measured):
    if not native._library().dlrm_has_byte_products():
        pytest.skip("this processor has no VNNI instructions")
    servable = load(measured, 1, make_engine=native_int8)
    assert servable.self_check() < 1e-6
    batch = random_batch(WIDE, 20)
    want = servable.predict(batch.dense_BxN, batch.ids_BxK)
    assert np.abs(want - load(measured, 1).predict(batch.dense_BxN, batch.ids_BxK)).max() > 1e-6
    with running(measured, "--kernels=native_int8") as server:  # The newest was not measured: the one before is served.
        values = (("dense", "FP32", batch.dense_BxN), ("ids", "INT32", batch.ids_BxK))
        inputs = [{"name": n, "datatype": t, "shape": v.shape, "data": v.ravel().tolist()} for n, t, v in values]
        status, _, answer = server.ask("POST", "/v2/models/tiny/infer", {"inputs": inputs})
        outputs = {output["name"]: output["data"] for output in answer["outputs"]}
        assert status == 200
        np.testing.assert_array_equal(np.array(outputs["probability"], np.float32), want)
        assert server.stop() == 0


def test_an_export_that_cannot_be_measured_names_its_flag(tmp_path):
    run = SimpleNamespace(model=tiny_model(compute_dtype="bfloat16"))
    with pytest.raises(ConfigError, match="--int8_layers computes in float32, this model in bfloat16"):
        export(run, tmp_path / "out", int8_layers=True)
    assert not (tmp_path / "out").exists()
