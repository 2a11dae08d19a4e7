"""The pages of docs/: what is made of the code is current, the site builds without a warning, errors are real."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest

from dlrm_jax.data.schema.schema import Dense, Label, Schema, Sparse, Split
from dlrm_jax.data.schema.schema_io import load
from tests.helpers import ROOT

DOCS = ROOT / "docs"


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_what_is_made_of_the_code_is_current():
    """FLAGS.md is every flag; REFERENCE.md the reference's; SCHEMA.md has what really becomes of its examples."""
    done = run("docs/make_pages.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Among the warnings are links to what is not there, and pages that no page leads to."""
    pytest.importorskip("sphinx")
    done = run("-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in DOCS.glob("*.md")} == {path.stem for path in (tmp_path / "site/docs").glob("*.html")}
    assert "README.html" in (tmp_path / "site" / "index.html").read_text()


def test_the_schemas_page_names_every_field_and_its_whole_schema_is_one(tmp_path):
    page = (DOCS / "SCHEMA.md").read_text()
    for kind in (Schema, Label, Dense, Sparse, Split):
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name}\b", page), f"{kind.__name__}.{field.name}"
    (tmp_path / "schema.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    found = load(tmp_path / "schema.yaml")
    assert found.name == "my_log" and len(found.sparse) == 9 and found.split == Split("time")
    assert found.sparse[1].table_name == found.sparse[2].table_name == "item"


def printed_texts() -> list[str]:
    """What commands are known to print, and every text of the package, where a value stands as three dots."""
    texts = [(ROOT / "experiments" / "wrong_uses.md").read_text()]
    for path in (ROOT / "dlrm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_quoted_errors_are_printed():
    """The first column of TROUBLE.md's tables of what is printed."""
    sections = (DOCS / "TROUBLE.md").read_text().split("\n## ")[1:-1]
    quoted = [text for section in sections for text in re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)]
    assert len(quoted) > 30
    texts = printed_texts()
    for text in quoted:
        pieces = [re.escape(piece) for piece in text.split("...") if piece]
        pattern = re.compile("[^\n]*?".join(pieces))
        assert any(pattern.search(known) for known in texts), f"nobody prints {text!r}"


def test_readmes_table_is_that_of_the_measurements():
    done = run("experiments/measured.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    """Within one screen a stranger finds their path; what needs more room has a page."""
    assert len((ROOT / "README.md").read_text().splitlines()) < 180


def test_no_page_names_a_flag_that_is_none():
    """Each `--flag` of README and docs/ is in FLAGS.md, or is another program's, on a page about it."""
    known = set(re.findall(r"^\| `--(\w+)`", (DOCS / "FLAGS.md").read_text(), re.MULTILINE))
    known |= {f"no{name}" for name in known} | {"flagfile", "help", "helpfull", "name", "noname"}
    others = {"check", "part", "rows", "scaled_times", "max", "dcn_num_layers", "dcn_low_rank_dim", "ruleset"}
    for path in (ROOT / "README.md", *DOCS.glob("*.md")):
        text = path.read_text()
        if path.name == "REFERENCE.md":
            text = re.sub(r"^\| `--[\w-]+`", "", text, flags=re.MULTILINE)
        unknown = set(re.findall(r"(?<![\w-])--(\w+)\b(?!--|\()", text)) - known - others
        assert not unknown, f"{path.name}: {sorted(unknown)}"
