"""Settings of single tables: the file, what it may hold, and that each table is trained by its own."""

import dataclasses
import json

import numpy as np
import pytest

from dlrm_jax.api.trained import open_stored
from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import loop, opening
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.step import make_train_step
from dlrm_jax.training.table_settings import read_table_settings, require_known
from tests.helpers import SHARDINGS, optimizer, random_batch, tiny_model
from tests.placement_helpers import by_name, difference, pad
from tests.training.resume_test import CONFIG

KNOWN = {"user", "item"}


def written(value):
    return value if isinstance(value, str) else json.dumps(value)


def test_what_a_file_says_becomes_fields_of_the_tables():
    text = written({"tables": {"user": {"dim": 8, "optimizer": "adam,b1=0.8", "rate": 0.1}, "item": {}}})
    require_known(read_table_settings(text), KNOWN)
    assert read_table_settings(text) == {
        "user": {"embedding_dim": 8, "optimizer": "adam,b1=0.8", "rate": 0.1},
        "item": {},
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", r"the file cannot be read \(.*\); write \{"),
        ({"user": {}}, r"the file cannot be read"),
        ({"tables": [1]}, r"the file cannot be read"),
        ({"tables": {"users": {}}}, r"table 'users' is not in the data, which has item, user$"),
        ({"tables": {"user": "row_wise"}}, r"table 'user' is 'row_wise'; expected names with values$"),
        ({"tables": {"user": {"color": 1}}}, r"table 'user': unknown color; known are dim, dtype, optimizer, rate$"),
        ({"tables": {"user": {"rate": "fast"}}}, r"table 'user': rate is 'fast'; expected a number$"),
        ({"tables": {"user": {"dim": True}}}, r"table 'user': dim is True; expected a whole number$"),
        ({"tables": {"user": {"dtype": "int9"}}}, r"table 'user': dtype is 'int9'; choose one of float32, bfloat16, "),
        ({"tables": {"user": {"optimizer": "adamm"}}}, r"table_optimizer is 'adamm'; choose one of sgd, momentum"),
    ],
)
def test_a_file_that_cannot_be_is_one_line(value, message):
    with pytest.raises(ConfigError, match=message):
        require_known(read_table_settings(written(value)), KNOWN)


def own_settings():
    """Three tables of three rules and rates."""
    own = {"user": {"optimizer": "adam"}, "item": {"rate": 0.5}, "flag": {"optimizer": "sgd", "rate": 2.0}}
    tables = tuple(dataclasses.replace(table, **own[table.name]) for table in tiny_model().tables)
    return tiny_model(tables=tables)


def trained(placed, steps=5):
    step = placed.jit_step(make_train_step(placed.model, LossConfig(), placed.optimizer, 1, placed.ops))
    state = placed.init_state(3)
    for i in range(steps):
        state, _ = step(state, placed.put(pad(random_batch(tiny_model(), 16, seed=i), placed.num_devices)))
    return state


def test_each_table_moves_by_its_own_rule_and_rate():
    model, start = own_settings(), on_one_device(tiny_model(), optimizer("rowwise_adagrad")).init_state(3)
    born = dict(named_tables(tiny_model(), start.tables))
    got = trained(on_one_device(model, optimizer("rowwise_adagrad")), steps=1)
    got = {name: np.asarray(rows) - born[name] for name, rows in named_tables(model, got.tables)}
    for name, rule, factor in (("user", "adam", 1), ("item", "rowwise_adagrad", 0.5), ("flag", "sgd", 2)):
        alone = trained(on_one_device(tiny_model(), optimizer(rule)), steps=1)
        moved = np.asarray(dict(named_tables(tiny_model(), alone.tables))[name]) - born[name]
        assert np.abs(moved).max() > 0
        halved = trained(on_one_device(tiny_model(), dataclasses.replace(optimizer(rule), table_rate=0.5)), steps=1)
        moved_half = np.asarray(dict(named_tables(tiny_model(), halved.tables))[name]) - born[name]
        np.testing.assert_allclose(moved_half, moved / 2, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[name], factor * moved, rtol=1e-5, atol=1e-6, err_msg=name)


def test_tables_of_several_rules_are_the_same_under_a_mix_of_placements():
    model, settings = own_settings(), optimizer("rowwise_adagrad")
    plain = {
        name: np.asarray(rows) for name, rows in named_tables(model, trained(on_one_device(model, settings)).tables)
    }
    for offset in (0, 2):
        kinds = {t.name: SHARDINGS[(i + offset) % len(SHARDINGS)] for i, t in enumerate(model.tables)}
        placed = Placed(model, settings, make_plan(model, MeshShape(2, 2), kinds), make_mesh(MeshShape(2, 2)))
        assert difference(by_name(placed, trained(placed).tables), plain) < 1e-5


def test_a_run_takes_the_file(tmp_path):
    text = written({"tables": {"user": {"optimizer": "adam", "dim": 2}, "item": {"dtype": "bfloat16"}}})
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, tables=text), num_steps=10)
    result = loop.train_and_evaluate(config, tmp_path / "run")
    assert result["step"] == 10
    model = opening.read(config)[1]
    assert model.table("user").embedding_dim == 2 and model.table("item").dtype == "bfloat16"
    slots = trained_slots(model, config)
    assert {"mean", "square"} in slots and {"sum"} in slots
    # The run keeps what the file said: whoever opens it again needs no file.
    opened = open_stored(tmp_path / "run", "latest")
    assert opened.model == model and opened.step == 10


def trained_slots(model, config):
    state = on_one_device(model, config.optimizer).abstract_state
    return [set(slots) for slots in state.table_opt_state.values()]
