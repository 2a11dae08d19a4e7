"""The tables of experiments/published_quality.py: rows that are measured anew take the place of their own alone."""

import importlib
import sys

import pytest

from tests.helpers import ROOT


@pytest.fixture
def published(monkeypatch):
    """The script, as a module."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    return importlib.import_module("published_quality")


def test_rows_that_are_kept_keep_their_date(tmp_path, published):
    page = tmp_path / "README.md"
    page.write_text("<!-- published -->\n| a | 1 |\n| b | 2 |\n\nMeasured then, there.\n<!-- /published -->\n")
    kept = {"a": "| a | 1 |", "b": "| b | 2 |"}
    some = published.stamp_of(page, "published", {"b": "| b | 3 |"}, kept, "Measured now, here.")
    assert some == "Measured then, there.\n\nOf these, b: measured now, here."
    every = published.stamp_of(page, "published", {"a": "", "b": ""}, kept, "Measured now, here.")
    assert every == "Measured now, here."
