"""Every command block of README.md and docs/PUBLISHING.md, run in order, as it stands, in a fresh copy of the project.

A comment above a block says what it needs that may be missing: `<!-- not run: WHY -->` leaves it out, `<!-- needs:
PROGRAM -->` runs it where there is one. A block that ends in `dlrm_jax.serve` is a server, which later blocks ask.
`pip` is a stand-in that knows pyproject.toml, and ports 8000 and 8001 are free ones.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator

import pytest

from dlrm_jax.data.schema.schema_io import load
from tests.helpers import ROOT

README, PUBLISHING = ((ROOT / name).read_text() for name in ("README.md", "docs/PUBLISHING.md"))
NOT_RUN = 5
"""Blocks that need what this test cannot have. More of them would be a README that no one tries."""

_BLOCK = re.compile(r"((?:^<!--[^\n]*-->\n)*)^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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

    line: int
    language: str
    text: str
    not_run: str
    needs: str

    @property
    def is_server(self) -> bool:
        """Whether its last line runs until it is ended."""
        return "dlrm_jax.serve " in self.text.strip().splitlines()[-1]


def blocks(page: str = README) -> list[Block]:
    """All of them, in order."""

    def said(comments: str, word: str) -> str:
        found = re.search(rf"<!-- {word}: (.*?) -->", comments)
        return found[1] if found else ""

    found = []
    for match in _BLOCK.finditer(page):
        comments, language, text = match.groups()
        line = page[: match.start(3)].count("\n")
        found.append(Block(line, language, text, said(comments, "not run"), said(comments, "needs")))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        kept = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
        self.environment = kept | {"JAX_PLATFORMS": "cpu", "PATH": f"{programs}:{os.environ['PATH']}"}
        self.servers: list[subprocess.Popen] = []

    def start(self, block: Block) -> tuple[subprocess.Popen, pathlib.Path]:
        """Begin with a block; what it prints goes into the file."""
        text = re.sub(r"\b800[01]\b", lambda port: self.ports[port[0]], block.text)
        shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        log = self.logs / f"line_{block.line}.log"
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
        assert status == 0, f"line {block.line} of the page ended with {status}:\n{log.read_text()[-3000:]}"
        return log.read_text()

    def serve(self, block: Block) -> None:
        """A block that is a server, until it is ready."""
        process, log = self.start(block)
        self.servers.append(process)
        while '"model_ready"' not in log.read_text():
            assert process.poll() is None, f"the server at line {block.line} of the page:\n{log.read_text()[-3000:]}"
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
@pytest.mark.parametrize("page", [README, PUBLISHING], ids=["README", "PUBLISHING"])
def test_every_block_runs_as_it_stands(tmp_path, page):
    reader = Reader(tmp_path)
    try:
        for block in blocks(page):
            if block.language not in ("bash", "python") or block.not_run:
                continue
            if block.needs and not shutil.which(block.needs):
                continue
            if block.is_server:
                reader.stop_serving()
                reader.serve(block)
            else:
                reader.run(block)
        reader.stop_serving()
    finally:
        for process in reader.servers:
            with ended(process):
                pass


def test_few_blocks_are_not_run_and_each_says_why():
    found = blocks()
    assert len(re.findall(r"^```\w+$", README, re.MULTILINE)) == len(found), "a block is not recognised as one"
    assert sum(bool(block.not_run) for block in found) == NOT_RUN
    assert {block.language for block in found} <= {"bash", "python", "yaml", ""}


def test_the_example_schema_is_one(tmp_path):
    (text,) = (block.text for block in blocks() if block.language == "yaml")
    (tmp_path / "schema.yaml").write_text(text)
    assert load(tmp_path / "schema.yaml").name == "my_log"


def test_no_text_advises_to_install_from_an_index():
    """The package is on none; extras are installed from a checkout, and exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = set()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("dlrm_jax/**/*.py"), *ROOT.glob("experiments/**/*")):
        if path.suffix in (".md", ".py", ".ipynb"):
            text = path.read_text()
            assert not re.search(r"pip install [\\\"'.]*dlrm_jax", text), path
            asked |= set(re.findall(r"""(?:\.\[|how_to_install\(["'])([a-z-]+)""", text))
    assert asked <= set(extras) and {"serve", "tpu-plan", "native", "test"} <= asked
