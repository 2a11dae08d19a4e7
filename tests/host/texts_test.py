"""Tests `dlrm_jax/host/texts.py`."""

from dlrm_jax.host.texts import aligned


def test_columns_are_in_line():
    rows = [["name", "rows", "why"], ["t", "1,000", ""], ["longer", "7", "it fits"]]
    assert aligned(rows, left=(0, 2)) == "name     rows  why\nt       1,000\nlonger      7  it fits"
    assert aligned([["a", "bb"], ["cc", "d"]], left=()) == " a  bb\ncc   d"
