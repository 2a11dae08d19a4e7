"""Every code block of README.md and docs/, run in the site's order, as it stands, in a fresh copy of the repository.

A comment above a block says what it needs that may be missing: `<!-- not run: WHY -->` leaves it out, `<!-- needs:
PROGRAM -->` runs it where there is one; `<!-- prints -->`, that it is what the block before it prints, where `...`
stands for whatever there is. A block that ends in `dlrm_jax.serve` is a server, which later blocks ask. `pip` is a
stand-in that knows pyproject.toml, and ports 8000 and 8001 are free ones.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator

import pytest

from dlrm_jax.config.documents import from_yaml
from dlrm_jax.data.schema.schema_io import from_dict
from tests.helpers import ROOT

PAGES = ("README.md", *(f"docs/{name}.md" for name in runpy.run_path(str(ROOT / "docs" / "conf.py"))["pages"]()))
ELSEWHERE = {"docs/ADDING.md": "adding_test.py", "docs/API.md": "docs_test.py", "docs/PYTHON.md": "a test of its own"}
"""Pages whose blocks others run."""
READ_HERE = tuple(page for page in PAGES if page not in ELSEWHERE)
BY_DEFAULT = ("README.md", "docs/LOGS.md", "docs/SERVING.md", "docs/MIGRATING.md")
"""Pages whose blocks make what they need, and run whenever the tests do."""
NOT_RUN = 5
"""Blocks that need what this test cannot have. More of them would be pages that no one tries."""
LANGUAGES = {"bash", "python", "yaml", "csv", "json", "text", ""}

_BLOCK = re.compile(r"((?:^<!--[^\n]*-->\n)*)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PIP = '''#!{python}
"""Stands in for pip: nothing is installed, but what is asked for has to exist."""
import pathlib, re, sys, tomllib
extras = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
command, *rest = sys.argv[1:]
assert command == "install", sys.argv
while rest:
    word = rest.pop(0)
    if word == "-r":
        assert pathlib.Path(rest.pop(0)).is_file(), sys.argv
    elif word != "-e":
        asked = re.fullmatch(r"\\.\\[([a-z-]+)\\]", word)
        assert asked and asked[1] in extras, f"pip cannot install {{word}}"
'''


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str
    needs: str
    prints: bool

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"

    @property
    def is_server(self) -> bool:
        """Whether its last line runs until it is ended."""
        return "dlrm_jax.serve " in self.text.strip().splitlines()[-1]


def blocks(pages: Iterable[str] = READ_HERE) -> list[Block]:
    """All of these pages, in order."""

    def said(comments: str, word: str) -> str:
        found = re.search(rf"<!-- {word}: (.*?) -->", comments)
        return found[1] if found else ""

    found = []
    for page in pages:
        text = (ROOT / page).read_text()
        for match in _BLOCK.finditer(text):
            comments, language, code = match.groups()
            line, prints = text[: match.start(3)].count("\n"), "<!-- prints -->" in comments
            found.append(Block(page, line, language, code, said(comments, "not run"), said(comments, "needs"), prints))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


OWN = ("JAX_NUM_CPU_DEVICES", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
"""Settings of the tests, which no reader has."""


class Reader:
    """Someone with a fresh clone and an environment, who types what README.md says."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.clone, self.logs = folder / "dlrm_jax", folder
        self.ports = {"8000": str(free_port()), "8001": str(free_port())}
        left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
        self.clone.mkdir()
        for name in ("dlrm_jax", "experiments"):
            shutil.copytree(ROOT / name, self.clone / name, ignore=left_out)
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.clone)
        programs = folder / "bin"
        programs.mkdir()
        python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        for name, text in {"pip": _PIP.format(python=sys.executable), "python": python}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if name not in OWN}
        self.environment = kept | {"JAX_PLATFORMS": "cpu", "PATH": f"{programs}:{os.environ['PATH']}"}
        self.servers: list[subprocess.Popen] = []

    def start(self, block: Block) -> tuple[subprocess.Popen, pathlib.Path]:
        """Begin with a block; what it prints goes into the file."""
        text = re.sub(r"\b800[01]\b", lambda port: self.ports[port[0]], block.text)
        shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        log = self.logs / f"{pathlib.Path(block.page).stem}_{block.line}.log"
        with log.open("w") as output:
            streams = {"stdout": output, "stderr": output}
            process = subprocess.Popen(
                [*shell, text], cwd=self.clone, env=self.environment, start_new_session=True, **streams
            )
        return process, log

    def run(self, block: Block) -> str:
        """A block to its end; what it printed."""
        process, log = self.start(block)
        with ended(process):
            status = process.wait()
        assert status == 0, f"{block.where}, ended with {status}:\n{log.read_text()[-3000:]}"
        return log.read_text()

    def serve(self, block: Block) -> None:
        """A block that is a server, until it is ready."""
        process, log = self.start(block)
        self.servers.append(process)
        while '"model_ready"' not in log.read_text():
            assert process.poll() is None, f"{block.where}, the server:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)

    def stop_serving(self) -> None:
        """Ctrl-C in the servers' terminals; they end of themselves, with status 0."""
        for process in self.servers:
            with ended(process):
                os.killpg(process.pid, signal.SIGINT)
                assert process.wait() == 0
        self.servers = []


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Nothing of the process is left afterwards, whatever happened."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "pages", [BY_DEFAULT, pytest.param(READ_HERE, marks=pytest.mark.exhaustive)], ids=["some", "all"]
)
def test_every_block_runs_as_it_stands(tmp_path, pages):
    reader = Reader(tmp_path)
    printed = ""
    try:
        for block in blocks(pages):
            if block.prints:
                assert_printed(block, printed)
            if block.language not in ("bash", "python") or block.not_run:
                continue
            if block.needs and not shutil.which(block.needs):
                continue
            if block.is_server:
                reader.stop_serving()
                reader.serve(block)
            else:
                printed = reader.run(block)
        reader.stop_serving()
    finally:
        for process in reader.servers:
            with ended(process):
                pass


def assert_printed(block: Block, printed: str) -> None:
    """A page shows the last lines of what was printed."""
    expected = block.text.splitlines()
    for shown, line in zip(expected, printed.splitlines()[-len(expected) :], strict=True):
        pattern = ".*".join(re.escape(piece) for piece in shown.split("..."))
        assert re.fullmatch(pattern, line), f"{block.where} shows {shown!r}, but {line!r} was printed"


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.exhaustive
def test_the_guide_for_python_runs_as_one_program(tmp_path):
    """Its commands first, which make the log; then all of its Python, which is one session."""
    reader, found = Reader(tmp_path), blocks(("docs/PYTHON.md",))
    for block in found:
        if block.language == "bash":
            reader.run(block)
    program = "".join(block.text for block in found if block.language == "python")
    said = reader.run(dataclasses.replace(found[-1], text=program))
    assert "Did you mean: embedding_dim ?" in said and "predicted step" in said
    assert {"curves.png", "plan.json", "tables"} <= {path.name for path in reader.clone.iterdir()}


def test_few_blocks_are_not_run_and_each_says_why():
    found = blocks()
    fences = sum(len(re.findall(r"^```", (ROOT / page).read_text(), re.MULTILINE)) for page in READ_HERE)
    assert fences == 2 * len(found), "a block is not recognised as one"
    assert sum(bool(block.not_run) for block in found) == NOT_RUN
    assert {block.language for block in found} <= LANGUAGES


def test_every_document_is_one():
    """YAML and JSON of all pages; what becomes of the schemas of SCHEMA.md is shown there (docs_test.py)."""
    needed = {"name": "log", "label": "click", "sparse": ["user"], "timestamp": "time"}
    of_json = [json.loads(block.text) for block in blocks() if block.language == "json"]
    schemas = [from_dict(needed | from_yaml(block.text)) for block in blocks() if block.language == "yaml"]
    assert all(isinstance(found, dict) for found in of_json)
    assert len(schemas) >= 19 and all(schema.sparse and schema.label.column for schema in schemas)


def test_no_text_advises_to_install_from_an_index():
    """The package is on none; extras are installed from a checkout, and exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = set()
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("dlrm_jax/**/*.py"),
        *ROOT.glob("experiments/**/*"),
    ):
        if path.suffix in (".md", ".py", ".ipynb"):
            text = path.read_text()
            assert not re.search(r"pip install [\\\"'.]*dlrm_jax", text), path
            asked |= set(re.findall(r"""(?:\.\[|how_to_install\(["'])([a-z-]+)""", text))
    assert asked <= set(extras) and {"serve", "tpu-plan", "native", "test"} <= asked
