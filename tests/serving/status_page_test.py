"""The status page in a real browser: what a person reads, and one row scored by hand. Skipped without Chromium."""

import json

import pytest

from tests.browser import browser  # noqa: F401
from tests.helpers import tiny_model, until
from tests.server_process import running
from tests.serving_helpers import export_tiny

pytestmark = pytest.mark.end_to_end


def test_a_person_sees_the_model_and_scores_a_row(browser, tmp_path):  # noqa: F811
    export_tiny(tmp_path / "model", tiny_model())
    with running(tmp_path / "model", "--batch_sizes=1,16") as server:
        browser.get(f"http://127.0.0.1:{server.port}/")

        def text(name, selector=""):  # In one step: the page may replace an element it has found.
            return browser.execute_script(f"return document.querySelector('#{name} {selector}').innerText")

        until(lambda: text("model") == "tiny, version 1" and text("state") == "ready")
        assert "test AUC" in text("facts") and "history" in text("features")
        browser.find_element("id", "score").click()
        until(lambda: text("answer").startswith("probability 0."))
        assert float(text("answer").split()[1]) > 0
        until(lambda: text("live", "td") not in ("", "0"))
        box = browser.find_element("id", "row")
        box.clear()
        box.send_keys(json.dumps({"x0": "<b>no</b>"}))
        browser.find_element("id", "score").click()
        until(lambda: "is missing" in text("answer"))
        assert browser.find_element("id", "answer").get_attribute("class") == "bad"
        refused = "status of 400"  # The browser notes the refusal that was asked for; nothing else may be there.
        assert [line for line in browser.get_log("browser") if refused not in line["message"]] == []
