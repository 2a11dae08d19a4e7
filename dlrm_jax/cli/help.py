"""What --help and --helpshort print: a command's flags in groups, with values, defaults and one example."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable

from absl import flags

FLAGS = flags.FLAGS
WORDS = {"--help": False, "-help": False, "--helpshort": True, "-helpshort": True}
"""What asks for help on the command line, and whether for the short one."""
SCREEN_ROWS = 24
_LEAST, _MOST = 60, 100
"""Columns of text."""
_RUN_FLAGS = "dlrm_jax.cli.flags"
_TYPES = {"int": "N", "float": "X", "numbers": "N,N,...", "comma separated list of strings": "TEXT,TEXT,..."}
_UNITS = ("seconds", "bytes", "rows", "steps", "epochs", "ms")
"""Last words of flags' names that are the unit of their numbers."""


def text(module: str, short: bool) -> str:
    """The help of the command in `module`, all of it or, where it is `short`, what fits a screen."""
    width = min(max(shutil.get_terminal_size().columns - 1, _LEAST), _MOST)
    purpose, example = _purpose_and_example(sys.modules[module].__doc__ or "")
    groups = _groups(module, alone=short)
    if not short:
        head = [*textwrap.wrap(purpose, width), f"  {example}"]
        lines = [line for title, own in groups.items() for line in ["", f"{title}:", *_explained(own, width)]]
        foot = "Flags may stand in a file, one a line: --flagfile=FILE. --helpshort fits a screen."
        return "\n".join([*head, *lines, "", *textwrap.wrap(foot, width)])
    head = [
        *textwrap.wrap(
            f"{purpose} --help explains each flag{', and has those that need others' if len(groups) > 1 else ''}.",
            width,
        ),
        f"  {example}",
        "",
    ]
    lines = [_first_words(flag, width) for own in groups.values() for flag in own]
    if len(head) + len(lines) > SCREEN_ROWS:
        lines = [line for title, own in groups.items() for line in _named(title, own, width)]
    return "\n".join([*head, *lines])


def _purpose_and_example(doc: str) -> tuple[str, str]:
    """A command's first line, as "Train a DLRM: `python -m ...`.", in its two parts."""
    found = re.match(r"(.*?): `(.*?)`", " ".join(doc.split("\n\n")[0].split()))
    assert found, "a command's docstring begins with what it does, and an example"
    return f"{found[1]}.", found[2]


def _groups(module: str, alone: bool) -> dict[str, list[flags.Flag]]:
    """Flags by the titles of their groups: the command's own, and those of a run as its dataclasses have them.

    With `alone` those that have no effect without others are left out.
    """
    defined = FLAGS.flags_by_module_dict()
    own = defined.get(sys.argv[0] if module == "__main__" else module, [])  # As absl calls the module that runs.
    found = {"this command": own} if own else {}
    of_run = {flag.name: flag for flag in defined.get(_RUN_FLAGS, [])}
    if of_run:
        from dlrm_jax.cli.flags import groups, run_settings  # With JAX, which preparation does not have.

        known = run_settings()
        for title, names in groups().items():
            found[title] = [of_run.pop(name) for name in names if not (alone and known[name].needs)]
        found["the run"] = [*(flag for name, flag in of_run.items() if name not in known), *found["the run"]]
    return {title: own for title, own in found.items() if own}


def _usage(flag: flags.Flag) -> str:
    """A flag as one types it: `--loss=bce|wbce|mse`, `--[no]shuffle`."""
    if flag.boolean:
        return f"--[no]{flag.name}"
    values = getattr(flag.parser, "enum_values", None)
    unit = flag.name.rpartition("_")[2]
    kind = unit.upper() if unit in _UNITS else _TYPES.get(flag.flag_type(), "TEXT")
    return f"--{flag.name}={'|'.join(value or '``' for value in values) if values else kind}"


def _default(flag: flags.Flag) -> str:
    """What it is where it is left out, in brackets; nothing for what is then not there."""
    value = flag.default
    if value is None or value in ("", (), []):
        return ""
    if isinstance(value, list | tuple):
        return f" [{','.join(map(str, value))}]"
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"


def _meaning(flag: flags.Flag) -> str:
    """What it does, without the values that absl puts before that."""
    return re.sub(r"^<[^>]*>: ", "", flag.help)


def _explained(own: Iterable[flags.Flag], width: int) -> list[str]:
    """Each flag with its default, and below it what it does."""
    lines, within = [], " " * 6
    for flag in own:
        usage = f"{_usage(flag)}{_default(flag)}"
        lines += textwrap.wrap(usage, width, initial_indent="  ", subsequent_indent=within)
        lines += textwrap.wrap(_meaning(flag), width, initial_indent=within, subsequent_indent=within)
    return lines


def _first_words(flag: flags.Flag, width: int) -> str:
    """A flag in one line."""
    line = f"--{flag.name:<24} {_meaning(flag)}"
    return line if len(line) <= width else f"{line[: width - 3].rstrip()}..."


def _named(title: str, own: Iterable[flags.Flag], width: int) -> list[str]:
    """The names of a group's flags."""
    names = " ".join(flag.name for flag in own)
    return textwrap.wrap(f"{title}: {names}", width, subsequent_indent="  ", break_on_hyphens=False)
