"""Tests `dlrm_jax/host/interrupts.py`: Ctrl-C ends a command in one line, however early or late it comes."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT

COMMANDS = ("train", "evaluate", "prepare", "plan", "benchmark", "export", "serve", "loadtest")
HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
"""Who starts the tests in the background has the signal ignored, which a process inherits."""


def interrupted(command: list[str], imports: int) -> tuple[int, list[str]]:
    """Start `command`, send SIGINT once it has imported so many modules; (exit status, what else is on stderr)."""
    start = [sys.executable, "-c", HEED, sys.executable, "-X", "importtime", *command]
    with subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        seen, ours, others = 0, False, []
        for line in process.stderr:
            if line.startswith("import time:"):
                ours = ours or line.endswith("| dlrm_jax\n")
                seen += ours
            else:
                others.append(line)
            if seen == imports:
                process.send_signal(signal.SIGINT)
        return process.wait(), others


@pytest.mark.end_to_end
@pytest.mark.parametrize("imports", [1, 40, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_modules_load_is_one_line(tmp_path, name, imports):
    never = tmp_path / "never"  # Nobody writes to it, so that the command waits there if it comes so far.
    os.mkfifo(never)
    status, lines = interrupted(["-m", f"dlrm_jax.{name}", f"--flagfile={never}"], imports)
    assert (status, lines) == (130, ["interrupted\n"])


@pytest.mark.end_to_end
def test_importing_the_package_leaves_ctrl_c_alone():
    script = "import signal, dlrm_jax\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", HEED, sys.executable, "-c", script], cwd=ROOT, check=True)


def command(body: str) -> list[str]:
    """A process that runs `body` as a command's main; `ctrl_c()` is the user."""
    script = (
        "import os, signal, sys\nfrom dlrm_jax.cli.commands import run_command\n"
        f"def ctrl_c():\n    os.kill(os.getpid(), signal.SIGINT)\ndef main():\n{body}\nrun_command(main)\n"
    )
    return [sys.executable, "-c", HEED, sys.executable, "-c", script]


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "body",
    [
        "    ctrl_c()",
        "    try:\n        ctrl_c()\n    except KeyboardInterrupt as e:\n        raise ImportError('no numpy') from e",
        "    class Dropped:\n        def __del__(self):\n            ctrl_c()\n    Dropped()\n    print('went on')",
        "    import atexit\n    atexit.register(ctrl_c)",
    ],
    ids=["at work", "made something else by a library", "dropped by a destructor", "at the end"],
)
def test_ctrl_c_in_a_command_is_one_line(body):
    done = subprocess.run(command(body), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.end_to_end
def test_who_ignores_ctrl_c_is_not_interrupted():
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ignoring = [part.replace("import os", f"{script}import os", 1) for part in command("    ctrl_c()\n    print('on')")]
    done = subprocess.run(ignoring[3:], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")
