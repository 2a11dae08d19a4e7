"""Replay recorded trajectories of the reference implementation: `python experiments/replay_reference.py FILE.npz ...`

Prints `NAME loss_diff=X weight_diff=Y` a file; exits 1 if one is beyond tolerance or cannot be replayed.
"""

import pathlib
import sys
import zipfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dlrm_jax import compat
from dlrm_jax.config import ConfigError


def replay_file(path: pathlib.Path) -> bool:
    """Replay one file, print its line, and say whether it is within tolerance."""
    try:
        with np.load(path) as recording:
            result = compat.replay(recording)
    except (ConfigError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"{path.stem} error: {error}", file=sys.stderr)
        return False
    verdict = "" if result.passed else f" FAIL (tolerances {result.loss_tolerance:g}, {result.weight_tolerance:g})"
    print(f"{path.stem} loss_diff={result.loss_diff:.2e} weight_diff={result.weight_diff:.2e}{verdict}")
    return result.passed


def main(arguments: list[str]) -> int:
    """Replay all files given."""
    if not arguments:
        print("usage: python experiments/replay_reference.py FILE.npz...", file=sys.stderr)
        return 2
    passed = [replay_file(pathlib.Path(argument)) for argument in arguments]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
