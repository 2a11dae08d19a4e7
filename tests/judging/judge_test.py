"""Tests `dlrm_jax/judging/judge.py` and `report.py` against pandas: slices, groups, comparisons, rows that count."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from dlrm_jax.config import ConfigError
from dlrm_jax.judging.bootstrap import Bootstrap
from dlrm_jax.judging.judge import Options, compare, judge, parts_of_split, require_same_rows, units_of_split
from dlrm_jax.judging.report import comparison_text, report_json, report_text, summary
from tests.judging.logs import log_of, scored
from tests.judging.measures_test import by_scikit_learn, gauc_by_pandas

ROWS = scored(1)
DATA = log_of(ROWS)
SPLIT = DATA.splits["test"]


def test_slices_equal_pandas_and_scikit_learn():
    report = judge(ROWS, SPLIT, DATA, Options(group_by="user", slice_by=("hour", "history")))
    frame = pd.DataFrame({"hour": SPLIT.dense_RxN[:, 0], "row": np.arange(len(ROWS))})
    assert list(report.slices) == ["hour", "history"]
    for one, (hour, part) in zip(report.slices["hour"], frame.groupby("hour"), strict=True):
        rows = ROWS.kept(part.row.to_numpy())
        assert one.text == f"{hour:g}" and one.num_rows == len(part)
        want = by_scikit_learn(rows, rows.weight_R)
        want["gauc"], _ = gauc_by_pandas(rows, SPLIT.ids_RxK[part.row, 0], rows.weight_R)
        assert dict(one.values) == pytest.approx(want, abs=1e-6)
    assert sum(one.num_rows for one in report.slices["history"]) == len(ROWS)


def test_rows_of_weight_0_count_nowhere():
    weighted = scored(2, weighted=True)
    data, counted = log_of(weighted), weighted.weight_R > 0
    options = Options(group_by="user", slice_by=("hour",), bootstrap=Bootstrap(40))
    report = judge(weighted, data.splits["test"], data, options)
    assert report.whole.num_rows == counted.sum()
    want = by_scikit_learn(weighted.kept(counted), weighted.weight_R[counted])
    assert {name: report.whole.values[name] for name in want} == pytest.approx(want, abs=1e-7)
    spoilt = dataclasses.replace(weighted, logits_R=np.where(counted, weighted.logits_R, np.nan))
    assert judge(spoilt, data.splits["test"], data, options) == report


def test_intervals_hold_the_value_and_a_report_says_all():
    options = Options(group_by="user", slice_by=("hour",), bootstrap=Bootstrap(100, 0.9))
    report = judge(ROWS, SPLIT, DATA, options)
    for one in (report.whole, *report.slices["hour"]):
        for name in ("auc", "log_loss", "brier"):
            low, high = one.intervals[name]
            assert low < one.values[name] < high
    text = report_text(report)
    groups = report.groups
    for words in ("by hour", "intervals of 90%", "100 bootstrap resamples of groups by user", "gauc: mean AUC within"):
        assert words in text
    assert f"within {groups.num_groups} groups" in text and f"left out: {groups.one_class_groups} groups" in text
    written = json.loads(json.dumps(report_json(report)))
    assert written["slices"]["hour"][2]["intervals"]["gauc"][0] == report.slices["hour"][2].intervals["gauc"][0]
    assert summary(report)["gauc"] == report.whole.values["gauc"] and set(summary(report)["intervals"]) > {"auc"}
    assert report_text(judge(ROWS, SPLIT, DATA, Options())) == ""


def test_a_comparison_is_of_the_same_rows_and_paired():
    second = scored(1)
    second = dataclasses.replace(second, logits_R=second.logits_R[::-1].copy(), prob_R=second.prob_R[::-1].copy())
    parts = parts_of_split(SPLIT, DATA, Options(slice_by=("hour",)))
    found = compare(ROWS, second, units_of_split(SPLIT, DATA, "user"), Bootstrap(100), parts)
    want = sk.roc_auc_score(ROWS.label_R, second.logits_R) - sk.roc_auc_score(ROWS.label_R, ROWS.logits_R)
    delta = found.whole.differences["auc"]
    assert delta.value == pytest.approx(want) and delta.low < want < delta.high < 0 and delta.p <= 0.02
    text = comparison_text(found, "ours", "theirs")
    assert "theirs minus ours" in text and f"{want:+.5f}" in text
    assert {"gauc", "brier", "pr_auc"} <= set(found.whole.differences)
    assert "by hour" in text and [one.text for one in found.slices["hour"]] == [text for text, _ in parts["hour"]]
    for one, (_, part_R) in zip(found.slices["hour"], parts["hour"], strict=True):
        aucs = [sk.roc_auc_score(ROWS.label_R[part_R], rows.logits_R[part_R]) for rows in (ROWS, second)]
        delta = one.differences["auc"]
        assert one.num_rows == part_R.sum() and delta.value == pytest.approx(aucs[1] - aucs[0])
        assert delta.low < delta.value < delta.high


def test_a_model_differs_from_itself_in_no_slice():
    parts = parts_of_split(SPLIT, DATA, Options(slice_by=("hour",)))
    found = compare(ROWS, ROWS, units_of_split(SPLIT, DATA, ""), Bootstrap(40), parts)
    for one in found.slices["hour"]:
        assert {(delta.low, delta.high, delta.p) for delta in one.differences.values()} == {(0, 0, 1)}


def test_other_rows_are_refused_and_other_columns_are_not():
    with pytest.raises(ConfigError, match=r"--compare=x has other rows: 400 of fingerprint \w{8}, against 400 of"):
        require_same_rows(SPLIT, log_of(scored(9)).splits["test"], "--compare=x")
    require_same_rows(SPLIT, dataclasses.replace(SPLIT, ids_RxK=SPLIT.ids_RxK[:, :1], weight_R=None), "")
    with pytest.raises(ConfigError, match="other rows"):
        require_same_rows(SPLIT, dataclasses.replace(SPLIT, row_R=SPLIT.row_R + 1), "")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_slices": 1}, "--max_slices=1"), ({"slice_by": ("hour", "hour")}, "names a column twice")],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Options(**options)


def test_a_split_without_rows_is_one_line():
    rows = ROWS.kept(slice(0))
    with pytest.raises(ConfigError, match="no rows to judge"):
        judge(rows, log_of(rows).splits["val"] if len(rows) else SPLIT, DATA, Options())
