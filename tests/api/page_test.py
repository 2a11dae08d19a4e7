"""The page of `dlrm_jax.report`: what it says of runs, that it loads nothing, and that a phone shows it."""

import html.parser
import json
import shutil

import matplotlib.figure
import pytest

import dlrm_jax
from dlrm_jax.api.page import page
from dlrm_jax.config import ConfigError
from tests.browser import browser  # noqa: F401
from tests.in_process import call

ODD = "two <b>&amp; 'three'"
_VOID = {"meta", "img", "br"}


class Parsed(html.parser.HTMLParser):
    """Tables as rows of texts, what is loaded, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.names: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.loaded += [
            value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href", "action", "data")
        ]
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """The run again, as if with other settings, in a directory of an odd name; with a picture."""
    workdir = tmp_path_factory.mktemp("others") / ODD
    shutil.copytree(run.workdir, workdir, ignore=shutil.ignore_patterns("data"))
    flags = (workdir / "flags.txt").read_text().replace("--batch_size=64", "--batch_size=32")
    (workdir / "flags.txt").write_text(flags)
    result = run.result
    result["test"]["auc"] = None
    (workdir / "result.json").write_text(json.dumps(result))
    matplotlib.figure.Figure().savefig(workdir / "online.png")
    return dlrm_jax.Run(workdir)


def test_it_says_what_the_files_say_and_loads_nothing(run, other):
    text = page([run, other], slice_by=["item"])
    parsed = Parsed(text)
    assert parsed.loaded and all(place.startswith(("#", "data:image/png;base64,")) for place in parsed.loaded)
    assert not {"script", "link", "iframe", "b", "image"} & parsed.names and "url(http" not in text
    heads = {table[0][0]: table for table in parsed.tables}
    assert [row[0] for row in heads["setting"][1:]] == ["batch_size"] and heads["setting"][1][1:] == ["64", "32"]
    names = heads["setting"][0][1:]
    assert names[1].endswith(ODD) and names[0] != names[1]
    val, test = [table for table in parsed.tables if table[0][:2] == ["run", "auc"]]
    assert val[1][1] == f"{run.result['val']['auc']:.5f}" and test[2][1] == "-" and test[1][0] == names[0]
    want = run.evaluate("test", slice_by=["item"])["slices"]["item"]
    rows = [row for row in heads["slice"][1:] if row[1] == names[0]]
    assert [row[0] for row in rows] == [one["slice"] for one in want]
    assert [row[2] for row in rows] == [str(one["num_samples"]) for one in want]
    (costs,) = [table for table in parsed.tables if "samples/s" in table[0]]
    assert float(costs[1][3].replace(",", "")) == pytest.approx(
        run.result["step_cost"]["predicted"]["bytes"] / 1e6, abs=1e-3
    )
    (parts,) = [table for table in parsed.tables if "waits for input" in table[0]]
    predicted = run.result["step_cost"]["predicted"]
    assert sum(map(float, parts[1][1:-2])) == pytest.approx(predicted["seconds"] * 1e3, abs=0.01)
    assert ["jax", *[run.result["versions"]["jax"]] * 2] in heads[""]


def test_the_command_writes_it_and_says_what_cannot_be(run, tmp_path):
    out = tmp_path / "report.html"
    assert call("report", f"--out={out}", words=[str(run.workdir)]) == f"1 run: {out}\n"
    assert Parsed(out.read_text()).tables and 'name="viewport"' in out.read_text()
    for words, told in (
        ([], "no run is named"),
        ([str(run.workdir)] * 2, "workdir names must be unique"),
        ([str(tmp_path)], "config.json does not exist"),
    ):
        with pytest.raises(ConfigError, match=told):
            call("report", f"--out={out}", words=words)


def test_a_run_that_is_young_has_a_page(run, tmp_path):
    """It has settings only: nothing is measured yet."""
    shutil.copy(run.workdir / "config.json", tmp_path)
    text = page([dlrm_jax.Run(tmp_path)])
    assert "Not measured." in text and [table[0][0] for table in Parsed(text).tables] == ["setting"]


def test_of_one_run_it_has_the_settings_that_are_not_the_defaults(run):
    text = page([run])
    (settings,) = [table for table in Parsed(text).tables if table[0][0] == "setting"]
    told = dict(settings[1:])
    assert told["batch_size"] == "64" and "" not in told.values() and "Settings that differ" not in text
    assert text.count("<svg") == 2


@pytest.mark.end_to_end
def test_a_phone_shows_it_without_scrolling_sideways(browser, run, other, tmp_path):  # noqa: F811
    path = tmp_path / "report.html"
    path.write_text(page([run, other]))
    browser.set_window_size(500, 900)
    browser.get(path.as_uri())
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= inner <= 500
    places = "return Array.from(document.querySelectorAll('svg'), one => one.getBoundingClientRect().toJSON())"
    loss, auc = browser.execute_script(places)
    assert auc["top"] >= loss["bottom"] and min(loss["width"], auc["width"]) > 400
    assert "Predicted beside measured" in browser.find_element("tag name", "body").text
    assert browser.execute_script("return document.querySelector('img').naturalWidth") > 0
    assert [line for line in browser.get_log("browser") if "favicon" not in line["message"]] == []
