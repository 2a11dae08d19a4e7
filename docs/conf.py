"""The site: `python -m sphinx -W -c docs . build/site`, of README, these pages and what was measured.

The source is the whole checkout, so that the same Markdown with the same links is read on a code host and here.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NAVIGATION = {
    "Begin": ("LOGS", "SCHEMA", "CONCEPTS", "TRAINING", "TROUBLE"),
    "Go on": ("MODEL", "JUDGING", "RECORDS", "GROWING", "PUBLISHING", "DEVICES", "SPEED", "SERVING"),
    "Come from elsewhere": ("REFERENCE", "MIGRATING"),
    "Python": ("PYTHON", "API", "ADDING"),
    "Look up": ("FLAGS", "DESIGN", "LIMITS"),
}
"""Pages of docs/ in the order in which they are read, and their blocks run; one that is not there is left out."""

project = "dlrm_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
include_patterns = ["README.md", "docs/*.md", "experiments/README.md", "experiments/wrong_uses.md"]
exclude_patterns = [".*", "build", "**/.*"]
root_doc = "README"
html_theme = "furo"
html_title = "dlrm_jax"
myst_heading_anchors = 4
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"


def pages() -> list[str]:
    """The names of all pages of docs/, in the order of the navigation."""
    named = [name for names in NAVIGATION.values() for name in names]
    return [name for name in named if (ROOT / "docs" / f"{name}.md").is_file()]


def _with_navigation(app: object, name: str, source: list[str]) -> None:
    """What README does not hold, as a code host would show it: the tree of pages."""
    if name != root_doc:
        return
    there = set(pages())
    trees = {title: [f"docs/{page}" for page in names if page in there] for title, names in NAVIGATION.items()}
    trees["Measured"] = ["experiments/README", "experiments/wrong_uses"]
    for title, names in trees.items():
        lines = "\n".join(names)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{lines}\n```\n"


def _begin_at_readme(app: object, error: Exception | None) -> None:
    """A host of static files begins at index.html."""
    if error is None:
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html">\n'
        (pathlib.Path(app.outdir) / "index.html").write_text(page)  # type: ignore[attr-defined]


def setup(app: object) -> None:
    """Sphinx calls it."""
    from pygments.lexers.special import TextLexer  # Here, as tests read the navigation without Sphinx.

    app.add_lexer("csv", TextLexer)  # type: ignore[attr-defined]
    app.connect("source-read", _with_navigation)  # type: ignore[attr-defined]
    app.connect("build-finished", _begin_at_readme)  # type: ignore[attr-defined]
