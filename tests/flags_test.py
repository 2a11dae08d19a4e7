"""Tests `dlrm_jax/flags.py`: every flag reaches the setting that its name promises, and survives flags.txt."""

import ast
import dataclasses
import re

import pytest
from absl import flags

from dlrm_jax.flags import FLAGS, LEARNING_DEFAULTS, config_from_flags, define_run_flags, flagfile_text
from tests.helpers import ROOT

# flag -> (its text, where it ends up, the value there); together they make one valid run.
SETTINGS = {
    "dataset": ("movielens_100k", "data.dataset", "movielens_100k"),
    "data_dir": ("some/where", "data.data_dir", "some/where"),
    "split": ("time", "data.split", "time"),
    "num_examples": ("77", "data.num_examples", 77),
    "max_rows_per_table": ("99", "data.max_rows_per_table", 99),
    "num_dense": ("7", "data.num_dense", 7),
    "table_sizes": ("50,60", "data.table_sizes", (50, 60)),
    "hotness": ("3,4", "data.hotness", (3, 4)),
    "id_skew": ("0.5", "data.id_skew", 0.5),
    "id_trace": ("dist_{}.log", "data.id_trace", "dist_{}.log"),
    "multi_hot": ("virtual", "data.multi_hot", "virtual"),
    "multi_hot_sizes": ("2,5", "data.multi_hot_sizes", (2, 5)),
    "multi_hot_distribution": ("pareto", "data.multi_hot_distribution", "pareto"),
    "seed": ("5", "seed", 5),
    "shuffle": ("false", "shuffle", False),
    "ids_out_of_range": ("hash", "ids_out_of_range", "hash"),
    "cpu_kernels": ("native", "cpu_kernels", "native"),
    "embedding_dim": ("8", "model.embedding_dim", 8),
    "bottom_mlp": ("32,8", "model.bottom_mlp", (32, 8)),
    "top_mlp": ("9,1", "model.top_mlp", (9, 1)),
    "interaction": ("cross", "model.interaction", "cross"),
    "self_interaction": ("true", "model.self_interaction", True),
    "cross_layers": ("4", "model.cross_layers", 4),
    "cross_rank": ("6", "model.cross_rank", 6),
    "learned_pooling": ("true", "model.learned_pooling", True),
    "dense_init": ("torch", "model.dense_init", "torch"),
    "compute_dtype": ("bfloat16", "model.compute_dtype", "bfloat16"),
    "table_init": ("flax", "model.table_init", "flax"),
    "loss": ("wbce", "loss.name", "wbce"),
    "class_weights": ("0.5,2", "loss.class_weights", (0.5, 2.0)),
    "loss_threshold": ("0.01", "loss.threshold", 0.01),
    "dense_optimizer": ("adamw", "optimizer.dense", "adamw"),
    "table_optimizer": ("adagrad", "optimizer.table", "adagrad"),
    "learning_rate": ("0.7", "optimizer.schedule.learning_rate", 0.7),
    "adagrad_eps": ("1e-8", "optimizer.eps", 1e-8),
    "momentum": ("0.8", "optimizer.momentum", 0.8),
    "weight_decay": ("0.2", "optimizer.weight_decay", 0.2),
    "warmup_steps": ("3", "optimizer.schedule.warmup_steps", 3),
    "decay_start_step": ("4", "optimizer.schedule.decay_start_step", 4),
    "decay_steps": ("5", "optimizer.schedule.decay_steps", 5),
    "decay_power": ("1.5", "optimizer.schedule.decay_power", 1.5),
    "end_learning_rate": ("0.001", "optimizer.schedule.end_learning_rate", 0.001),
    "lr_compat": ("dlrm", "optimizer.schedule.compat", "dlrm"),
    "batch_size": ("12", "batch_size", 12),
    "num_micro_batches": ("3", "num_micro_batches", 3),
    "num_epochs": ("2", "num_epochs", 2),
    "num_steps": ("50", "num_steps", 50),
    "eval_batch_size": ("13", "eval_batch_size", 13),
    "eval_every": ("14", "eval_every", 14),
    "checkpoint_every": ("15", "checkpoint_every", 15),
    "steps_per_dispatch": ("4", "steps_per_dispatch", 4),
    "log_every": ("16", "log_every", 16),
    "target_metric": ("log_loss", "target_metric", "log_loss"),
    "target_value": ("0.4", "target_value", 0.4),
    "patience": ("17", "patience", 17),
    "sharding": ("column_wise", "sharding.sharding", "column_wise"),
    "sharding_plan": ("plan.json", "sharding.plan", "plan.json"),
    "mesh": ("data:2", "sharding.mesh", "data:2"),
    "group_size": ("2", "sharding.group_size", 2),
    "exchange_dtype": ("bfloat16", "sharding.exchange_dtype", "bfloat16"),
    "exchange_capacity": ("64", "sharding.exchange_capacity", 64),
    "pipeline_exchange": ("true", "sharding.pipeline", True),
}


@pytest.fixture(scope="module")
def parsed():
    define_run_flags()
    FLAGS(["train", *(f"--{name}={text}" for name, (text, _, _) in SETTINGS.items())])
    yield config_from_flags()
    for name in (*SETTINGS, "workdir"):
        delattr(FLAGS, name)


def at(config, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_flag_files_say_how_they_learn():
    """So that their published results do not depend on defaults."""
    files = sorted((ROOT / "experiments").glob("*.flags"))
    assert len(files) >= 14
    for path in files:
        lines = path.read_text().splitlines()
        above = [line.split("=")[1] for line in lines if line.startswith("--flagfile=")]
        lines += [line for name in above for line in (ROOT / name).read_text().splitlines()]
        said = {line.split("=")[0].removeprefix("--") for line in lines}
        assert set(LEARNING_DEFAULTS) <= said, path.name


def test_defaults_are_those_that_were_chosen_by_measurement():
    chosen = re.search(r"^CHOSEN = (\(.*\))$", (ROOT / "experiments" / "choose_defaults.py").read_text(), re.MULTILINE)
    assert tuple(map(str, LEARNING_DEFAULTS.values())) == ast.literal_eval(chosen[1])


@pytest.mark.parametrize("name", SETTINGS)
def test_flag_reaches_its_setting(parsed, name):
    _, path, value = SETTINGS[name]
    assert at(parsed, path) == value


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "seed"])
def test_value_is_not_the_default(parsed, name):
    assert FLAGS[name].value != FLAGS[name].default, "a flag set to its default tests nothing"


def test_every_flag_and_every_setting_is_covered(parsed):
    ours = {flag.name for flag in FLAGS.flags_by_module_dict()["dlrm_jax.flags"]}
    assert ours == set(SETTINGS) | {"workdir"}

    def leaves(value, path: str) -> set[str]:
        if not dataclasses.is_dataclass(value):
            return {path}
        names = [field.name for field in dataclasses.fields(value)]
        return set().union(*(leaves(getattr(value, name), f"{path}.{name}".lstrip(".")) for name in names))

    assert leaves(parsed, "") == {path for _, path, _ in SETTINGS.values()} | {"data.seed"}
    assert parsed.data.seed == parsed.seed


def test_flagfile_text_gives_the_same_config(parsed, tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text(flagfile_text())
    FLAGS.unparse_flags()
    FLAGS(["train", f"--flagfile={path}"])
    assert config_from_flags() == parsed
    assert all(line.startswith("--") for line in path.read_text().splitlines())
    assert isinstance(FLAGS, flags.FlagValues)
