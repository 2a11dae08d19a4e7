"""The steps of docker/Dockerfile, taken in a fresh environment, as no builder is here: each instruction is done.

Of the system's packages nothing is installed, and of Python's only this one: those that it depends on are there
already, as `pip` would have put them. What is copied, installed and started is real.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig

import pytest

from tests import serving_helpers
from tests.helpers import ROOT, tiny_model

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.end_to_end]
_PIP = """#!/bin/sh
# pip install EXTRAS: this package, without what it depends on.
exec {python} -m pip install --quiet --no-deps --ignore-installed "$(echo "$3" | sed 's/\\[.*//')"
"""


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """By name: what a stage is made from, and (instruction, what follows it) in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in filter(None, text.splitlines()):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            source, name = rest.split(" AS ")
            found[name] = (source, [])
        else:
            found[name][1].append((instruction, rest))
    return found


class Image:
    """A directory in which a stage's steps were taken; `entry` is what it starts, `directory` where."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._root = folder
        environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        (self.site,) = environment.glob("lib/*/site-packages")
        (self.site / "theirs.pth").write_text(sysconfig.get_path("purelib"))
        programs = folder / "programs"
        programs.mkdir()
        for program in ("apt-get", "useradd"):
            (programs / program).symlink_to(shutil.which("true") or "/bin/true")
        (programs / "pip").write_text(_PIP.format(python=environment / "bin" / "python"))
        (programs / "pip").chmod(0o755)
        path = f"{programs}:{environment / 'bin'}:{os.environ['PATH']}"
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
        self.directory, self.entry = folder, [""]

    def take(self, steps: list[tuple[str, str]]) -> None:
        """These steps, behind those that were taken before."""
        for instruction, rest in steps:
            getattr(self, f"_{instruction.lower()}")(rest)

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.environment[name] = value

    def _workdir(self, rest: str) -> None:
        self.directory = self._root / rest.lstrip("/")
        self.directory.mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        for source in sources:
            if (ROOT / source).is_dir():
                kept = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, self.directory / target, ignore=kept)
            else:
                shutil.copy(ROOT / source, self.directory / target)

    def _run(self, rest: str) -> None:
        # What apt-get left is removed; here it left nothing.
        steps = rest.replace("rm -rf /var/lib/apt/lists/*", "true")
        subprocess.run(["sh", "-c", steps], cwd=self.directory, env=self.environment, check=True)

    def _user(self, rest: str) -> None:
        assert rest == "server"

    def _expose(self, rest: str) -> None:
        assert rest == "8000"

    def _entrypoint(self, rest: str) -> None:
        self.entry = json.loads(rest)
        self.program = shutil.which(self.entry[0], path=self.environment["PATH"])
        assert self.program, f"{self.entry[0]} was not installed"


@pytest.mark.timeout(300)
def test_the_images_train_and_serve(tmp_path):
    """From what was copied alone: the package with its C++ sources, in an empty directory."""
    found = stages()
    assert re.fullmatch(r"python:3\.1[1-4]-slim", found["base"][0])
    assert found["train"][0] == found["serve"][0] == "base"
    image = Image(tmp_path)
    image.take(found["base"][1])
    assert list(image.site.glob("dlrm_jax/**/*.cc")) and not (image.site / "tests").exists()

    image.take(found["train"][1])
    small = ["--num_examples=2000", "--num_steps=2", "--workdir=runs/small", "--batch_size=64"]
    where = {"cwd": image.directory, "env": image.environment, "text": True}
    done = subprocess.run([image.program, *image.entry[1:], *small], capture_output=True, **where)
    assert done.returncode == 0 and (image.directory / "runs/small/result.json").is_file(), done.stderr[-2000:]

    image.take(found["serve"][1])
    serving_helpers.export_tiny(tmp_path / "exported", tiny_model())
    entry = [word.replace("=/model", f"={tmp_path / 'exported'}") for word in image.entry[1:]]
    assert image.directory == tmp_path / "model" and "--port=8000" in entry
    where["cwd"] = image.directory
    command = [image.program, *entry, "--port=0", "--host=127.0.0.1"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, **where)
    try:
        lines: list[str] = []
        for line in server.stderr or ():
            lines.append(line)
            if '"model_ready"' in line:
                break
        assert lines and '"model_ready"' in lines[-1], "".join(lines)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
