"""The C++ scorer under hostile calls: never a crash; under sanitizers never a read or a write beyond an array."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.serving.native_fuzz import Fuzz
from tests.tables.native_test import needs_compiler

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g"


@needs_compiler
def test_whatever_is_passed_is_scored_or_refused(tmp_path):
    fuzz = Fuzz(0, tmp_path)
    fuzz.run(1)
    for what in ("run: TypeError", "C++: refused", "C++ model: refused", "files: ConfigError", "predict: BadRequest"):
        assert fuzz.counts[what] > 5, fuzz.counts
    for what in ("run", "C++", "C++ model", "while files change", "while ids change", "predict"):
        assert fuzz.counts[f"{what}: scored"], fuzz.counts


def sanitizer_libraries() -> str:
    """What must be loaded before anything else, or nothing where g++ has none."""
    names = ("libasan.so", "libubsan.so") if sys.platform == "linux" and shutil.which("g++") else ()
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return " ".join(found) if found and all(map(os.path.isabs, found)) else ""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not sanitizer_libraries(), reason="g++ and its sanitizers are not here")
def test_sanitizers_find_nothing(tmp_path):
    """Its counts are printed (`pytest -s`); `python -m tests.serving.native_fuzz` runs longer."""
    environment = os.environ | {
        "LD_PRELOAD": sanitizer_libraries(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DLRM_SANITIZE": SANITIZERS,
        "CXX": "g++",
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.serving.native_fuzz", "0", "3"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    print(finished.stdout)
    assert sum(json.loads(finished.stdout.splitlines()[-1]).values()) > 1000
