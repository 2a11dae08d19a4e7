"""Tests `dlrm_jax/cli/flags.py`: every flag reaches the setting that its name promises, and survives flags.txt."""

import ast
import dataclasses
import re

import pytest
from absl import flags

from dlrm_jax.cli.flags import (
    FLAGS,
    LEARNING_DEFAULTS,
    config_from_flags,
    define_run_flags,
    flagfile_text,
    run_settings,
    unchecked_config,
)
from dlrm_jax.config import ConfigError
from tests.helpers import ROOT

TABLES = ROOT / "tests" / "fixtures" / "tables.json"

# flag -> (its text, where it ends up, the value there); each is valid, if not of use, beside the others.
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
    "num_periods": ("6", "data.num_periods", 6),
    "drift": ("0.25", "data.drift", 0.25),
    "profile_steps": ("3:9", "profile_steps", "3:9"),
    "seed": ("5", "seed", 5),
    "shuffle": ("false", "shuffle", False),
    "kernels": ("native", "kernels", "native"),
    "allow_oversubscription": ("true", "allow_oversubscription", True),
    "embedding_dim": ("8", "model.embedding_dim", 8),
    "bottom_mlp": ("32,8", "model.bottom_mlp", (32, 8)),
    "top_mlp": ("9,1", "model.top_mlp", (9, 1)),
    "interaction": ("parallel_cross", "model.interaction.name", "parallel_cross"),
    "cross_layers": ("4", "model.interaction.options.cross_layers", 4),
    "cross_rank": ("6", "model.interaction.options.cross_rank", 6),
    "tower_mlp": ("9,3", "model.interaction.options.tower_mlp", (9, 3)),
    "embed_numbers": ("true", "model.embed_numbers", True),
    "learned_pooling": ("true", "model.learned_pooling", True),
    "compress_tables": ("qr,collisions=8", "model.compress_tables", "qr,collisions=8"),
    "table_dtype": ("bfloat16", "model.table_dtype", "bfloat16"),
    "tables": (str(TABLES), "model.tables", TABLES.read_text()),
    "activation": ("bottom:gelu,top:silu", "model.activation", "bottom:gelu,top:silu"),
    "norm": ("top:batch", "model.norm", "top:batch"),
    "dropout": ("0.2", "model.dropout", "0.2"),
    "dense_init": ("torch", "model.dense_init", "torch"),
    "compute_dtype": ("bfloat16", "model.compute_dtype", "bfloat16"),
    "table_init": ("normal:1e-4", "model.table_init", "normal:1e-4"),
    "loss": ("wbce", "loss.name", "wbce"),
    "class_weights": ("0.5,2", "loss.class_weights", (0.5, 2.0)),
    "loss_threshold": ("0.01", "loss.threshold", 0.01),
    "dense_optimizer": ("adamw", "optimizer.dense", "adamw"),
    "table_optimizer": ("adagrad", "optimizer.table", "adagrad"),
    "table_l2": ("0.01", "optimizer.table_l2", 0.01),
    "table_clip_norm": ("2", "optimizer.table_clip_norm", 2.0),
    "table_weight_decay": ("0.03", "optimizer.table_weight_decay", 0.03),
    "table_max_norm": ("4", "optimizer.table_max_norm", 4.0),
    "learning_rate": ("0.7", "optimizer.schedule.learning_rate", 0.7),
    "adagrad_eps": ("1e-8", "optimizer.eps", 1e-8),
    "momentum": ("0.8", "optimizer.momentum", 0.8),
    "weight_decay": ("0.2", "optimizer.weight_decay", 0.2),
    "warmup_steps": ("3", "optimizer.schedule.warmup_steps", 3),
    "decay_start_step": ("4", "optimizer.schedule.decay_start_step", 4),
    "decay_steps": ("5", "optimizer.schedule.decay_steps", 5),
    "lr_decay": ("cosine", "optimizer.schedule.decay", "cosine"),
    "lr_plateau": ("patience:1,min:1e-5", "optimizer.schedule.plateau", "patience:1,min:1e-5"),
    "dense_l2": ("0.02", "optimizer.dense_l2", 0.02),
    "clip_norm": ("7", "optimizer.clip_norm", 7.0),
    "table_update": ("all", "optimizer.table_update", "all"),
    "most_rows_updated": ("9", "most_rows_updated", 9),
    "clip_value": ("5", "optimizer.clip_value", 5.0),
    "table_rate": ("0.5", "optimizer.table_rate", 0.5),
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
    "data_on_device": ("always", "data_on_device", "always"),
    "log_every": ("16", "log_every", 16),
    "target_metric": ("log_loss", "target_metric", "log_loss"),
    "target_value": ("0.4", "target_value", 0.4),
    "fit_temperature": ("true", "fit_temperature", True),
    "patience": ("17", "patience", 17),
    "allow_schedule_change": ("true", "allow_schedule_change", True),
    "init_from": ("runs/yesterday", "init_from", "runs/yesterday"),
    "mllog": ("org:Example", "records.mllog", "org:Example"),
    "histogram_rows": ("500", "records.histogram_rows", 500),
    "publish": ("models/live", "publishing.model_dir", "models/live"),
    "publish_every": ("30s", "publishing.every", "30s"),
    "publish_whole_every": ("7", "publishing.whole_every", 7),
    "publish_tables": ("int8", "publishing.tables", "int8"),
    "spare_rows": ("0.5", "publishing.spare_rows", 0.5),
    "keep": ("3", "publishing.keep", 3),
    "init_steps": ("reset", "init_steps", "reset"),
    "init_only": ("tables", "init_only", "tables"),
    "sharding": ("column_wise", "sharding.sharding", "column_wise"),
    "sharding_plan": ("plan.json", "sharding.plan", "plan.json"),
    "mesh": ("data:2", "sharding.mesh", "data:2"),
    "group_size": ("2", "sharding.group_size", 2),
    "exchange_dtype": ("bfloat16", "sharding.exchange_dtype", "bfloat16"),
    "exchange_capacity": ("64", "sharding.exchange_capacity", 64),
    "pipeline_exchange": ("true", "sharding.pipeline", True),
}


# Options of interactions other than that of SETTINGS: with their interaction.
OPTIONS = {
    "self_interaction": ("dot", "true", True),
    "projection_branch1": ("projection", "7,16", (7, 16)),
    "projection_branch2": ("projection", "9,32", (9, 32)),
}
TEXTS = {name: text for name, (text, *_) in SETTINGS.items()} | {name: text for name, (_, text, _) in OPTIONS.items()}


@pytest.fixture(scope="module")
def parsed():
    define_run_flags()
    FLAGS(["train", *(f"--{name}={text}" for name, text in TEXTS.items())])
    yield unchecked_config()
    for name in (*TEXTS, "workdir"):
        delattr(FLAGS, name)


def at(config, path: str):
    for name in path.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
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


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "seed"])
def test_value_is_not_the_default(parsed, name):
    assert FLAGS[name].value != FLAGS[name].default, "a flag set to its default tests nothing"


def test_every_flag_and_every_setting_is_covered(parsed):
    ours = {flag.name for flag in FLAGS.flags_by_module_dict()["dlrm_jax.cli.flags"]}
    assert ours == set(TEXTS) | {"workdir"}

    def leaves(value, path: str) -> set[str]:
        if isinstance(value, dict):
            return {f"{path}.{name}" for name in value}
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
    assert unchecked_config() == parsed
    assert all(line.startswith("--") for line in path.read_text().splitlines())
    assert isinstance(FLAGS, flags.FlagValues)


DECAY = ("decay_steps=5",)
# Of each flag that has an effect under some settings only: those settings.
NEEDS = {
    "split": ("dataset=movielens_100k", "data_dir=raw"),
    **dict.fromkeys(("num_examples", "num_periods"), ()),
    "drift": ("num_periods=6",),
    **dict.fromkeys(("init_steps", "init_only"), ("init_from=runs/yesterday",)),
    **dict.fromkeys(
        ("publish_every", "publish_whole_every", "publish_tables", "spare_rows", "keep"), ("publish=models/live",)
    ),
    "max_rows_per_table": ("dataset=criteo_kaggle", "data_dir=raw"),
    **dict.fromkeys(("num_dense", "id_skew", "id_trace"), ("dataset=synthetic",)),
    "table_sizes": ("dataset=synthetic",),
    "hotness": ("dataset=synthetic", "table_sizes=50,60"),
    "multi_hot_sizes": ("multi_hot=virtual",),
    "multi_hot_distribution": ("multi_hot=virtual", "multi_hot_sizes=2,5"),
    "self_interaction": (),
    "norm": (),
    "dropout": (),
    **dict.fromkeys(("cross_layers", "cross_rank"), ("interaction=cross",)),
    "tower_mlp": ("interaction=parallel_cross",),
    **dict.fromkeys(("projection_branch1", "projection_branch2"), ("interaction=projection",)),
    "class_weights": ("loss=wbce",),
    "adagrad_eps": (),
    "momentum": ("dense_optimizer=momentum",),
    "most_rows_updated": ("table_update=all",),
    "weight_decay": ("dense_optimizer=adamw",),
    **dict.fromkeys(("decay_start_step", "decay_power", "end_learning_rate", "lr_decay", "lr_compat"), DECAY),
    "num_epochs": (),
    "fit_temperature": (),
}
# Settings under which it has none, where that is not so by default.
WITHOUT = {
    "num_examples": ("dataset=criteo_kaggle", "data_dir=raw"),
    "num_periods": ("dataset=synthetic",),
    "self_interaction": ("interaction=cat",),
    **dict.fromkeys(("norm", "dropout"), ("bottom_mlp=16", "top_mlp=1")),
    "num_epochs": ("num_steps=50",),
    "fit_temperature": ("loss=mse",),
    "adagrad_eps": ("dense_optimizer=sgd", "table_optimizer=sgd"),
}
OTHERS = [
    ("adagrad_eps=1e-8", "table_optimizer=rowwise_adagrad"),
    ("max_rows_per_table=9", "dataset=synthetic"),
    ("num_examples=90", "dataset=synthetic"),
    ("momentum=0.9",),  # As by default: that says nothing.
    ("class_weights=1,1",),
    ("table_sizes=" + ",".join(["1000"] * 8),),
]
HAVE_NONE = [
    (("decay_power=3", "decay_steps=5", "lr_compat=dlrm"), "--decay_power=3.0 has no effect here: it needs"),
    (("decay_power=3", "decay_steps=5", "lr_decay=linear"), "--decay_power=3.0 has no effect here: it needs"),
    (("id_skew=2", "data_dir=mine", "dataset=synthetic"), "--id_skew=2.0 has no effect"),
    (("table_sizes=5,6", "data_dir=mine"), "--table_sizes=5,6 has no effect here: it is for --dataset=synthetic"),
    (("class_weights=0.5,2",), "--class_weights=0.5,2.0 has no effect here: it is for --loss=wbce; leave it out"),
]


@pytest.fixture
def parse():
    define = "seed" not in FLAGS
    if define:
        define_run_flags()

    def parse_flags(*flags: str) -> None:
        FLAGS.unparse_flags()
        for flag in FLAGS.flags_by_module_dict()["dlrm_jax.cli.flags"]:
            flag.unparse()
        FLAGS(["train", *(f"--{flag}" for flag in flags)])

    yield parse_flags
    if define:
        for name in (*run_settings(), "workdir"):
            delattr(FLAGS, name)


def test_only_who_trains_one_run_publishes(parse):
    parse("publish=models/live")
    assert config_from_flags(publishes=True).publishing.seconds == 60
    with pytest.raises(
        ConfigError, match=r"--publish=models/live is for dlrm_jax\.train and dlrm_jax\.online; leave it out here"
    ):
        config_from_flags()


def test_every_flag_that_needs_others_is_tried_without_them():
    assert set(NEEDS) == {name for name, known in run_settings().items() if known.needs}


@pytest.mark.parametrize("name", NEEDS)
def test_a_flag_without_effect_is_refused_or_said(parse, name, caplog):
    given, needs = f"{name}={TEXTS[name]}", run_settings()[name].needs
    parse(given, *NEEDS[name])
    config_from_flags(publishes=True)
    assert not caplog.text
    parse(given, *WITHOUT.get(name, ()))
    if name == "multi_hot_sizes":
        words = "multi_hot and multi_hot_sizes go together"
    elif name == "weight_decay":
        words = "only adamw decays weights"
    else:
        words = f"--{name}=.* has no effect here: {needs.words}"
    if needs.refused:
        with pytest.raises(ConfigError, match=words):
            config_from_flags()
    else:
        config_from_flags()
        assert words.partition(".*")[2] in caplog.text


@pytest.mark.parametrize("name", [name for name, known in run_settings().items() if not known.needs])
def test_a_flag_with_an_effect_everywhere_is_never_refused(parse, name):
    together = {
        "multi_hot": ["multi_hot_sizes=2,5"],
        "embedding_dim": ["bottom_mlp=8"],
        "bottom_mlp": ["embedding_dim=8"],
    }
    together |= {"num_micro_batches": ["batch_size=12"], "dataset": ["data_dir=raw"]}
    text, path, value = SETTINGS[name]
    parse(f"{name}={text}", *together.get(name, []))
    assert at(config_from_flags(publishes=True), path) == value


@pytest.mark.parametrize("name", OPTIONS)
def test_flag_reaches_the_interaction_whose_option_it_is(parse, name):
    interaction, text, value = OPTIONS[name]
    parse(f"interaction={interaction}", f"{name}={text}")
    assert config_from_flags().model.interaction.options[name] == value


@pytest.mark.parametrize("flags", OTHERS)
def test_flags_that_have_an_effect_or_say_the_default(parse, flags, caplog):
    parse(*flags)
    assert config_from_flags() == unchecked_config() and not caplog.text


@pytest.mark.parametrize(("flags", "words"), HAVE_NONE)
def test_flags_that_have_none(parse, flags, words):
    parse(*flags)
    with pytest.raises(ConfigError, match=words):
        config_from_flags()


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*.flags")), ids=lambda path: path.stem)
def test_files_of_flags_and_what_runs_write_of_them_are_accepted(parse, path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    generated = any(f"--dataset={name}\n" in path.read_text() for name in ("planted", "synthetic"))
    parse(f"flagfile={path}", "data_dir=" if generated else "data_dir=raw")
    config = config_from_flags()
    (tmp_path / "flags.txt").write_text(flagfile_text())
    parse(f"flagfile={tmp_path}/flags.txt")
    assert config_from_flags() == config
