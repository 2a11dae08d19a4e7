"""The steps of docker/*.Dockerfile, taken in a fresh environment, as no builder is here: each instruction is done.

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

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]
_PIP = """#!/bin/sh
# pip install EXTRAS: this package, without what it depends on.
exec {python} -m pip install --quiet --no-deps --ignore-installed "$(echo "$3" | sed 's/\\[.*//')"
"""


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, what follows it) of a Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "docker" / name).read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


class Image:
    """A directory in which an image's steps were taken; `entry` is what it starts, `directory` where."""

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        self._root = folder
        environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        (site,) = environment.glob("lib/*/site-packages")
        (site / "theirs.pth").write_text(sysconfig.get_path("purelib"))
        programs = folder / "programs"
        programs.mkdir()
        for program in ("apt-get", "useradd"):
            (programs / program).symlink_to(shutil.which("true") or "/bin/true")
        (programs / "pip").write_text(_PIP.format(python=environment / "bin" / "python"))
        (programs / "pip").chmod(0o755)
        path = f"{programs}:{environment / 'bin'}:{os.environ['PATH']}"
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
        self.directory, self.entry = folder, [""]
        for instruction, rest in instructions(name):
            getattr(self, f"_{instruction.lower()}")(rest)

    def _from(self, rest: str) -> None:
        """Python of a version that is tested."""
        assert re.fullmatch(r"python:3\.1[1-4]-slim", rest)

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
    """Each from what it copied alone: the package with its C++ sources, in an empty directory."""
    image = Image("train.Dockerfile", tmp_path / "train")
    (site,) = (tmp_path / "train").glob("environment/lib/*/site-packages")
    assert list(site.glob("dlrm_jax/**/*.cc")) and not (site / "tests").exists()
    small = ["--num_examples=2000", "--num_steps=2", "--workdir=runs/small", "--batch_size=64"]
    done = subprocess.run(
        [image.program, *image.entry[1:], *small],
        cwd=image.directory,
        env=image.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and (image.directory / "runs/small/result.json").is_file(), done.stderr[-2000:]

    image = Image("serve.Dockerfile", tmp_path / "serve")
    serving_helpers.export_tiny(tmp_path / "exported", tiny_model())
    entry = [word.replace("=/model", f"={tmp_path / 'exported'}") for word in image.entry[1:]]
    assert image.directory == tmp_path / "serve" / "model" and "--port=8000" in entry
    command = [image.program, *entry, "--port=0", "--host=127.0.0.1"]
    server = subprocess.Popen(command, cwd=image.directory, env=image.environment, stderr=subprocess.PIPE, text=True)
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
