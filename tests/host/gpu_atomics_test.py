"""Tests `dlrm_jax.host.gpu_atomics`: who gets the compiler's option, and that commands ask for it."""

import importlib.metadata
import importlib.util
import os

import pytest

from dlrm_jax.cli import commands
from dlrm_jax.host import gpu_atomics

OPTION = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"


@pytest.mark.parametrize(
    ("version", "plugins", "expected"),
    [
        ("0.10.2", ("jax_cuda13_plugin",), OPTION),
        ("0.11.0", ("jax_cuda12_plugin",), OPTION),
        ("0.11.1", ("jax_cuda13_plugin",), ""),
        ("0.10.2", (), ""),
    ],
)
def test_only_what_is_affected_gets_the_option(monkeypatch, version, plugins, expected):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(importlib.metadata, "version", {"jaxlib": version}.get)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in plugins else None)
    gpu_atomics.use_hardware_additions()
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", OPTION),
        ("--xla_a=1", f"--xla_a=1 {OPTION}"),
        ("--xla_backend_extra_options=-x,-y --xla_a=1", f"--xla_a=1 {OPTION.replace('=-', '=-x,-y,-')}"),
        (OPTION, OPTION),
        (f"{OPTION}=false", f"{OPTION}=false"),
    ],
)
def test_what_the_user_set_stays(before, after):
    assert gpu_atomics.with_option(before) == after


def test_commands_ask_for_it_before_they_begin(monkeypatch):
    done = []
    monkeypatch.setattr(gpu_atomics, "use_hardware_additions", lambda: done.append("asked"))
    monkeypatch.setattr(commands, "_log_to_stderr", lambda: None)
    monkeypatch.setattr(commands.app, "run", lambda guarded, flags_parser: guarded(["command"]))
    commands.run_command(lambda: done.append("began"))
    assert done == ["asked", "began"]
