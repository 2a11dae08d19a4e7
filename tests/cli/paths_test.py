"""Every command with paths that a library may take for more than names: globs, URLs, lists, shells, file systems."""

import json
import os
import pathlib

import pytest

from dlrm_jax.cli import flags
from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.source import expand
from dlrm_jax.training import checkpoint
from tests.in_process import call, defined
from tests.server_process import running

SMALL = ("--embedding_dim=4", "--bottom_mlp=4", "--top_mlp=4,1", "--batch_size=64")
ODD = "[1] a[!b]#c?d=%41,e;f&g'h\"i*j$HOME^^$~{}{k}@2:日本ü"
"""Each of these was, or may become, something else to a glob, a URL, a list, a shell, a format, TeX or array_record."""
LONG = "/".join(["long" * 50] * 15)


def write_log(directory: pathlib.Path) -> None:
    directory.mkdir(parents=True)
    rows = "".join(f"{i % 2},{i / 7},v{i % 5}\n" for i in range(400))
    (directory / "log.csv").write_text("label,x,c\n" + rows)
    (directory / "s.yaml").write_text("name: mine\nlabel: label\ndense: [x]\nsparse: [c]\n")


def prepare_train_and_export(p: str) -> dict:
    """From log to model below `p`, which ends in what begins a file's name; what evaluate says."""
    call("prepare", f"--input={p}log.csv", f"--output={p}data", f"--schema={p}s.yaml")
    call("train", f"--data_dir={p}data", f"--workdir={p}run", "--num_steps=3", "--sharding=table_wise", *SMALL)
    # Another plan reads a checkpoint's tables row by row, as export does.
    call("train", f"--flagfile={p}run/flags.txt", "--num_steps=6", "--sharding=row_wise")
    call("export", f"--workdir={p}run", f"--out={p}model", f"--data_dir={p}data", "--evaluate=test")
    said = call("evaluate", f"--workdir={p}run", f"--predictions_out={p}scores.csv", "--checkpoint=latest")
    return json.loads(said.splitlines()[-1])


def all_commands(p: str) -> dict:
    call("prepare", f"--input={p}log.csv", f"--output={p}data", f"--schema={p}s.yaml")
    assert f"pictures: {p}data/" in call("prepare", f"--describe={p}data")
    call("plan", f"--data_dir={p}data", f"--json={p}plan.json", f"--picture={p}plan.png", "--hardware=h100", *SMALL)
    call("benchmark", f"--data_dir={p}data", f"--json={p}b.json", f"--picture={p}b.png", "--seconds=0", *SMALL)
    call("plan", f"--data_dir={p}data", f"--sharding_plan={p}plan.json", "--hardware=h100", *SMALL)
    return prepare_train_and_export(p)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A directory of such a name, with what every command made in it."""
    directory = tmp_path_factory.mktemp("odd") / ODD
    write_log(directory)
    return directory, all_commands(f"{directory}/")


@pytest.mark.exhaustive
def test_every_command_takes_names_as_they_are(odd):
    directory, said = odd
    assert said["step"] == 6 and len((directory / "scores.csv").read_text().splitlines()) == 43
    made = {"log.csv", "s.yaml", "data", "plan.json", "plan.png", "b.json", "b.png", "run", "model", "scores.csv"}
    assert {path.name for path in directory.iterdir()} == made
    assert [path.name for path in directory.parent.iterdir()] == [ODD], "nothing was written elsewhere"
    assert (directory / "model" / "1" / "manifest.json").is_file()


@pytest.mark.parametrize("place", ["-dash/", "link/../", f"{LONG}/"], ids=["dash", "dots", "long"])
@pytest.mark.sample(1)
def test_relative_linked_and_long_paths(tmp_path, monkeypatch, place):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    pathlib.Path("link").symlink_to(tmp_path / "elsewhere" / "inner")
    where = pathlib.Path(place).resolve() / "x"
    write_log(where)
    assert prepare_train_and_export(f"{place}x/")["step"] == 6
    assert {path.name for path in where.iterdir()} == {"log.csv", "s.yaml", "data", "run", "model", "scores.csv"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a\\b", "its name has a backslash"),
        (os.fsdecode(b"\xff"), "bytes that are no UTF-8"),
        ("/".join(["x" * 250] * 15), "its name has 3,"),
        ("a.__lock", "its name has a part that ends in .__lock"),
    ],
)
def test_a_workdir_that_tensorstore_cannot_name_is_refused_before_the_work(tmp_path, name, says):
    """It takes a backslash for a slash: the arrays were written into another directory, and the checkpoint lost."""
    with pytest.raises(ConfigError, match=says):
        call("train", f"--data_dir={tmp_path / 'none'}", "--dataset=criteo_kaggle", f"--workdir={tmp_path / name}")
    with pytest.raises(ConfigError, match=says):
        checkpoint.Checkpoints(tmp_path / name, read_only=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "end ", os.fsdecode(b"\xff")])
def test_what_flags_txt_cannot_hold_is_refused(value):
    with defined("train"):
        flags.FLAGS(["train", f"--data_dir={value}"])
        with pytest.raises(ConfigError, match=r"'--data_dir=.*' cannot be kept in flags.txt"):
            flags.flagfile_text()


def test_a_file_that_is_there_is_named_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.csv", "c.csv", "day[1].csv", "day1.csv", "*", "d[1]/x10.csv", "d[1]/x9.csv", "d1/x.csv"):
        pathlib.Path(name).parent.mkdir(exist_ok=True)
        pathlib.Path(name).touch()
    assert expand("a,b.csv") == ("a,b.csv",)
    assert expand("c.csv,a,b.csv,day[1].csv,") == ("c.csv", "a,b.csv", "day[1].csv")
    assert expand("*") == ("*",)
    assert expand("day?.csv") == ("day1.csv",)
    assert expand("a,?.csv") == ("a,b.csv",)
    assert expand("d[1]/x*.csv") == ("d[1]/x9.csv", "d[1]/x10.csv")
    assert expand("d[1-2]/*.csv") == ("d1/x.csv",)
    assert expand(f"{tmp_path}/**/x9.csv") == (f"{tmp_path}/d[1]/x9.csv",)
    for missing in ("c.csv,no.csv", "no.csv,c.csv", "no?.csv", "c.csv,,no.csv"):
        with pytest.raises(ConfigError, match=r"--input=no.?.csv matches no file"):
            expand(missing)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_judging_searching_and_several_seeds_take_names_as_they_are(odd):
    directory, _ = odd
    before = {path.name for path in directory.iterdir()}
    (directory / "s.search").write_text("method: grid\nflags: {learning_rate: [0.1, 0.01]}")
    small = (f"--data_dir={directory}/data", "--num_steps=2", *SMALL)
    call("tune", f"--search={directory}/s.search", f"--workdir={directory}/search", *small)
    call("train", f"--flagfile={directory}/search/best.flags", f"--workdir={directory}/best")
    call("train", f"--workdir={directory}/seeds", "--num_seeds=2", *small)
    both = (f"--workdir={directory}/best", f"--compare={directory}/seeds/seed-0", "--bootstrap=40", "--importance")
    call("evaluate", *both, f"--plots={directory}/plots", f"--json={directory}/e.json", "--slice_by=c")
    made = {"plots", "e.json", "s.search", "search", "best", "seeds"}
    assert {path.name for path in directory.iterdir()} - before == made
    assert all((directory / "best" / name).is_file() for name in ("result.json", "flags.txt"))
    assert {path.name for path in (directory / "plots").iterdir()} == {"calibration.png", "importance.png", "lift.png"}
    assert [path.name for path in directory.parent.iterdir()] == [ODD], "nothing was written elsewhere"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_serve_and_loadtest_take_names_as_they_are(odd):
    directory, _ = odd
    with running(directory / "model", "--batch_sizes=1,16") as server:
        flags_of_loadtest = (f"--url=http://127.0.0.1:{server.port}", "--qps=20", "--seconds=1")
        call("loadtest", *flags_of_loadtest, f"--json={directory / 'l.json'}", f"--picture={directory / 'l.png'}")
    assert json.loads((directory / "l.json").read_text())["failed"] == 0
    assert (directory / "l.png").stat().st_size > 1000
