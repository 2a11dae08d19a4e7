"""`--histogram_rows`: TensorBoard's histograms are of the run's own rows and gradients, and change no bit of it."""

import dataclasses
import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dlrm_jax.data.read.load import load_dataset
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training import loop
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.record_options import RecordOptions
from tests.helpers import optimizer
from tests.training.resume_test import CONFIG, assert_same_bits, final_state

SGD = dataclasses.replace(CONFIG, optimizer=optimizer("sgd", "sgd", rate=1.0))


def with_histograms(config, rows: int, **changes):
    return dataclasses.replace(config, records=RecordOptions(histogram_rows=rows), **changes)


def histograms(workdir) -> dict[tuple[int, str], object]:
    """TensorBoard's histograms by (step, name), from the files of events: records of length, its check, data, check."""
    found = {}
    for path in (workdir / "tensorboard").iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            found |= {(event.step, one.tag): one.histo for one in event.summary.value if one.HasField("histo")}
    return found


def assert_describes(histogram, values_M, rtol: float = 1e-5) -> None:
    assert histogram.num == sum(histogram.bucket) == len(values_M)
    np.testing.assert_allclose(histogram.min, values_M.min(), rtol=rtol)
    np.testing.assert_allclose(histogram.max, values_M.max(), rtol=rtol)
    np.testing.assert_allclose(histogram.sum, values_M.sum(), rtol=rtol, atol=1e-5)
    limits = np.array(histogram.bucket_limit)
    below = [np.sum(values_M <= limit * (1 + rtol * np.sign(limit))) for limit in limits]
    assert np.all(np.cumsum(histogram.bucket) <= below) and len(limits) == len(histogram.bucket)


def test_they_are_of_the_rows_and_of_the_gradients_that_a_step_made(tmp_path):
    """A step of SGD at rate 1 says what its gradients were: the rows before it less those behind it."""
    loop.train_and_evaluate(with_histograms(SGD, 1000, num_steps=1), tmp_path)
    found = histograms(tmp_path)
    model = SGD.model.build(load_dataset(SGD.data))
    before, after = on_one_device(model, SGD.optimizer).init_state(SGD.seed), final_state(tmp_path, SGD)
    rows_after = dict(named_tables(model, after.tables))
    for name, rows in named_tables(model, before.tables):
        assert_describes(found[0, f"row_norms/{name}"], np.linalg.norm(rows, axis=1))
        norms = np.linalg.norm(np.asarray(rows, np.float64) - rows_after[name], axis=1)
        assert_describes(found[0, f"row_gradient_norms/{name}"], norms[norms > 0], rtol=1e-3)
    kernel = before.dense_params["top_mlp"]["layer_0"]["kernel"]
    assert_describes(found[0, "mlps/top_mlp/layer_0/kernel"], np.ravel(kernel))
    moved = np.ravel(kernel - after.dense_params["top_mlp"]["layer_0"]["kernel"])
    assert_describes(found[0, "mlp_gradients/top_mlp/layer_0/kernel"], moved, rtol=1e-3)
    leaves = len(jax.tree.leaves(before.dense_params))
    assert len(found) == 2 * len(rows_after) + 2 * leaves


def test_steps_of_the_log_have_them_of_a_sample_and_the_bits_stay(tmp_path):
    """Of 600 users every sixth, the same ones each time, and of every table no more than so many."""
    config = with_histograms(CONFIG, 100, num_steps=25, log_every=10)
    loop.train_and_evaluate(config, tmp_path / "shown")
    loop.train_and_evaluate(dataclasses.replace(config, records=RecordOptions()), tmp_path / "plain")
    state = final_state(tmp_path / "shown")
    assert_same_bits(state, final_state(tmp_path / "plain"))
    assert not histograms(tmp_path / "plain")
    found = histograms(tmp_path / "shown")
    assert {step for step, _ in found} == {0, 10, 20}
    loop.train_and_evaluate(dataclasses.replace(config, num_steps=20), tmp_path / "until")
    model = config.model.build(load_dataset(config.data))
    for name, rows in named_tables(model, final_state(tmp_path / "until").tables):
        sample = np.linalg.norm(rows[:: -(-len(rows) // 100)], axis=1)
        assert len(sample) <= 100
        assert_describes(found[20, f"row_norms/{name}"], sample)


@pytest.mark.exhaustive
@pytest.mark.parametrize("changes", [{"steps_per_dispatch": 4}, {"num_micro_batches": 2}])
def test_several_steps_at_once_have_them_too(tmp_path, changes):
    config = with_histograms(CONFIG, 100, num_steps=25, log_every=10, **changes)
    loop.train_and_evaluate(config, tmp_path)
    steps = sorted({step for step, _ in histograms(tmp_path)})
    assert len(steps) == 3 and all(0 <= step - due < 4 for step, due in zip(steps, (0, 10, 20), strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_several_devices_have_them_too(tmp_path, sharding):
    options = dataclasses.replace(CONFIG.sharding, sharding=sharding, mesh="model:4", pipeline=True)
    config = with_histograms(SGD, 1000, num_steps=1, sharding=options)
    loop.train_and_evaluate(config, tmp_path / "four")
    loop.train_and_evaluate(with_histograms(SGD, 1000, num_steps=1), tmp_path / "one")
    four, one = histograms(tmp_path / "four"), histograms(tmp_path / "one")
    assert four.keys() == one.keys()
    for key, histogram in one.items():
        np.testing.assert_allclose(
            [getattr(four[key], name) for name in ("num", "min", "max", "sum")],
            [getattr(histogram, name) for name in ("num", "min", "max", "sum")],
            rtol=1e-3,
            atol=1e-6,
        )
