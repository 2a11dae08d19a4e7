"""Tests what experiments/compare_peers.py computes from what it measured, and the floor below which no step can go."""

import dataclasses

import jax
import numpy as np
import pytest

from dlrm_jax.config import LossConfig
from dlrm_jax.training.placed import on_one_device
from experiments.peers.equal import UnequalError, check_equal, unequal
from experiments.peers.floor import distinct_rows, floors
from experiments.peers.ours import Ours
from experiments.peers.report import floor_table, rows_of, table
from tests.helpers import optimizer, random_batch, tiny_model

TAKEN = {
    "ours": [0.030, 0.040, 0.050],
    "floor": [0.010, 0.010, 0.010],
    "torch": [0.070, 0.060, 0.050],
}


def test_rows_hold_ratios_of_medians():
    (row,) = rows_of(TAKEN, {"torch": 2.0, "dense_jax": 9.0}).values()
    assert row["ratio"] == pytest.approx(1.5)
    assert row["most_ratio"] == pytest.approx(6.0) and row["goal"] == 2.0


@pytest.mark.parametrize(("goal", "said"), [(1.5, "met"), (1.6, "missed")])
def test_the_tables_say_which_goal_is_met(goal, said):
    results = {"kaggle": {"sgd": rows_of(TAKEN, {"torch": goal})}}
    line, floor = (text.splitlines()[-1] for text in (table(results), floor_table(results)))
    assert line == f"| kaggle | sgd | 40.00 ms | 60.0 ms | **1.50x**; {goal}x {said} | - | - | - | - | - | - |"
    assert floor == f"| kaggle | sgd | 10.0 ms | 4.00 | **6.00** (goal {goal}) | - | - |"
    for text in (table(results), floor_table(results)):
        assert len({row.count("|") for row in text.splitlines()}) == 1


def test_a_peer_whose_numbers_are_not_ours_is_told():
    model, rules = tiny_model(), optimizer("sgd", "sgd")
    ours, peer = (Ours(on_one_device(model, rules), LossConfig(), seed) for seed in (0, 1))
    peer.batch, peer.host = lambda batch: batch, np.asarray
    with pytest.raises(UnequalError, match="a peer: not equal to ours: logits differ by"):
        check_equal("a peer", ours, peer, [random_batch(model, 16)])
    fine = {"logits_before": 2e-4, "logits_after": 2e-4, "weights_after": 2e-5}
    assert not unequal(fine) and all(unequal(fine | {name: 3 * most}) for name, most in fine.items())


def test_distinct_rows_are_counted_by_table():
    model = tiny_model()
    ids_BxK = np.asarray(random_batch(model, 16).ids_BxK)
    columns = [feature.table for feature in model.features for _ in range(feature.hotness)]
    named = {(name, row) for ids in ids_BxK for name, row in zip(columns, ids.tolist(), strict=True) if row >= 0}
    assert distinct_rows(model, ids_BxK) == len(named)


def test_the_floor_has_every_layers_products_and_every_row():
    model, batch = tiny_model(), random_batch(tiny_model(), 16)
    params = on_one_device(model, optimizer()).init_state(0).dense_params
    shapes = [layer["kernel"].shape for part in ("bottom_mlp", "top_mlp") for layer in params[part].values()]
    forward, train_step = floors(model, params, batch)
    jax.tree.map(lambda array: array.delete(), params)  # As a step does, which gives its weights away.
    for i in range(2):
        outputs, looked_up = forward(i)
        gradients, updated = train_step(i)
        assert [output.shape for output in outputs] == [(16, width) for _, width in shapes]
        assert [of_weights.shape for of_weights, _ in gradients] == shapes
        assert [of_input.shape for _, of_input in gradients[1:]] == [(16, width) for width, _ in shapes[1:]]
        assert looked_up.shape == (batch.ids_BxK.size,)
        assert updated.shape == (distinct_rows(model, np.asarray(batch.ids_BxK)), model.embedding_dim)
        assert float(updated[0, 0]) == i + 2  # Written, in each step.


@pytest.mark.parametrize("interaction", ["dot", "cat"])
@pytest.mark.parametrize(("tables", "dense"), [("sgd", "sgd"), ("rowwise_adagrad", "adagrad")])
def test_torchrecs_model_is_ours(interaction, tables, dense):
    pytest.importorskip("torchrec")
    from experiments.peers.torchrec_dlrm import TorchRecDLRM

    model, rules = tiny_model(interaction=interaction), dataclasses.replace(optimizer(tables, dense), eps=1e-4)
    ours = Ours(on_one_device(model, rules), LossConfig(), seed=0)
    peer = TorchRecDLRM(model, rules, "bce", ours.state)
    check_equal("TorchRec", ours, peer, [random_batch(model, 16, seed) for seed in range(4)])
