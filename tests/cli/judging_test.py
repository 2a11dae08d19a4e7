"""`evaluate` as a judge, as a user types it: what is printed, drawn, written, and the one line for what cannot be."""

import json

import pytest

from dlrm_jax.config import ConfigError
from experiments.wrong_uses import FILES
from tests.in_process import call

SMALL = ("--embedding_dim=4", "--bottom_mlp=4", "--top_mlp=4,1", "--batch_size=64", "--num_steps=4", "--mesh=model:1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with runs on one log under two splits, `by_time` and `in_order`."""
    directory = tmp_path_factory.mktemp("judged")
    (directory / "log.csv").write_text(FILES["log.csv"])
    for name, split in (("by_time", "time, val: 0.2, test: 0.4"), ("in_order", "order, val: 0.2, test: 0.2")):
        schema = FILES["mine.yaml"].replace("by: time", f"by: {split}")
        (directory / f"{name}.yaml").write_text(schema)
        data = f"{directory}/data_{name}"
        call("prepare", f"--input={directory}/log.csv", f"--output={data}", f"--schema={directory}/{name}.yaml")
        call("train", f"--data_dir={data}", f"--workdir={directory}/{name}", *SMALL)
    return directory


def test_everything_that_can_be_asked(runs, tmp_path):
    said = call(
        "evaluate",
        *(f"--workdir={runs}/by_time", f"--compare={runs}/by_time"),
        *("--group_by=user", "--slice_by=item,price", "--max_slices=4", "--bootstrap=100", "--confidence=0.9"),
        *("--importance", "--importance_repeats=2", "--importance_rows=50"),
        *(f"--plots={tmp_path}/plots", f"--json={tmp_path}/report.json", f"--predictions_out={tmp_path}/scores.csv"),
    )
    line = json.loads(said.strip().splitlines()[-1])
    report = json.loads((tmp_path / "report.json").read_text())
    result = json.loads((runs / "by_time" / "result.json").read_text())
    for name in ("auc", "log_loss", "normalized_entropy", "calibration", "accuracy", "pr_auc", "brier"):
        assert line[name] == result["test"][name], "the headline is what training said"
        assert report["metrics"][name] == pytest.approx(line[name], abs=1e-6)
        assert report["comparison"][name]["value"] == 0 and report["comparison"][name]["p"] == 1
        assert line["intervals"][name] == report["intervals"][name]
    slices = report["comparison_by_slice"]["price"]
    assert [one["slice"] for one in slices] == [one["slice"] for one in report["slices"]["price"]]
    assert line["gauc"] == report["metrics"]["gauc"] and report["groups"]["column"] == "user"
    assert [one["slice"][:1] for one in report["slices"]["item"]][-1] == "("
    assert report["slices"]["item"][0]["slice"].startswith("i"), "items as in the log"
    assert sum(one["num_samples"] for one in report["slices"]["price"]) == line["num_samples"]
    assert {one["column"] for one in report["importance"]} == {"user", "item", "price"}
    for words in ("by item", "by price", "permutation importance: each column dealt out anew among 50 rows, 2 times"):
        assert words in said
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"calibration.png", "lift.png", "importance.png"}
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(rows) == line["num_samples"] + 1


def test_the_seed_flag_alone_decides_the_resamples(runs):
    flags = (f"--workdir={runs}/by_time", "--bootstrap=40")
    first, again, other = (call("evaluate", *flags, f"--seed={seed}").splitlines()[-1] for seed in (1, 1, 2))
    assert first == again != other


def test_columns_that_the_model_does_not_use_come_from_the_log_prepared_with_them(runs, tmp_path):
    schema = (runs / "by_time.yaml").read_text().replace("[user, item]", "[day]")
    (tmp_path / "day.yaml").write_text(schema)
    call("prepare", f"--input={runs}/log.csv", f"--output={tmp_path}/day", f"--schema={tmp_path}/day.yaml")
    flags = (f"--workdir={runs}/by_time", "--group_by=day", "--slice_by=day")
    said = call("evaluate", *flags, f"--columns_from={tmp_path}/day")
    assert "groups by day" in said and "\n2024-01-" in said
    with pytest.raises(ConfigError, match=r"--group_by=day: mine has no column 'day', .*: --columns_from=DIR"):
        call("evaluate", *flags)
    with pytest.raises(ConfigError, match=r"--columns_from=.*: its test split has other rows"):
        call("evaluate", *flags, f"--columns_from={runs}/data_in_order")


def test_rows_of_another_split_are_not_compared(runs):
    with pytest.raises(ConfigError, match=r"--compare=.*in_order: its test split has other rows: "):
        call("evaluate", f"--workdir={runs}/by_time", f"--compare={runs}/in_order")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group_by=session"], "--group_by=session: mine has no column 'session', it has user, item, price; "),
        (["--slice_by=item,colour"], "--slice_by=colour: mine has no column"),
        (["--max_slices=5"], "--max_slices=5 has no effect without --slice_by"),
        (["--slice_by=item", "--max_slices=1"], "--max_slices=1; it must be at least 2"),
        (["--bootstrap=5"], "it takes at least 40 resamples"),
        (["--confidence=0.9"], "--confidence=0.9 has no effect without --bootstrap"),
        (["--importance_rows=5"], "--importance_rows=5 has no effect without --importance"),
        (["--importance", "--importance_repeats=0"], "--importance_repeats=0"),
        (["--compare=nowhere"], "--compare=nowhere is no workdir of a training run"),
        (["--columns_from=data"], "--columns_from=data has no effect without --group_by or --slice_by"),
        (["--group_by=user", "--columns_from=nowhere"], "--columns_from=nowhere is no prepared dataset"),
        (["--seed=-1"], "--seed=-1"),
        (["--json=nowhere/x.json"], "--json=nowhere/x.json"),
    ],
)
def test_what_cannot_be_is_one_line(runs, flags, words):
    with pytest.raises(ConfigError) as error:
        call("evaluate", f"--workdir={runs}/by_time", *flags)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.exhaustive
def test_several_seeds_are_one_table(runs, tmp_path):
    said = call("train", f"--data_dir={runs}/data_by_time", f"--workdir={tmp_path}", "--num_seeds=2", *SMALL)
    written = json.loads((tmp_path / "seeds.json").read_text())
    of_auc = written["summary"]["test"]["auc"]
    assert f"{of_auc['mean']:.5f}" in said and f"2 seeds; all results are in {tmp_path}/seeds.json" in said
    assert list(written["runs"]) == ["0", "1"] and "--embedding_dim=4" in (tmp_path / "flags.txt").read_text()
    assert "auc" in call("evaluate", f"--workdir={tmp_path}/seed-1").splitlines()[0]
