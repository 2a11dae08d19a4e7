"""hashes.json of a prepared dataset: the hash of each file that is no block, and how many blocks each shard has.

Blocks have sums of their own. schema.yaml is for people, and dataset_info.json is TFDS' to write: of what they say only
the shards' lengths are used.
"""

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.prepare.staging import write_whole

HASHES = "hashes.json"
_NOT_OURS = (HASHES, "dataset_info.json")
_LOG = logging.getLogger("dlrm_jax")


def write_hashes(directory: pathlib.Path, shard_lengths: Mapping[str, list[int]]) -> None:
    """Note the files that are there, when all are."""
    found = [*directory.glob("*.json"), *directory.glob("*/*.parquet")]
    names = sorted(str(path.relative_to(directory)) for path in found if path.name not in _NOT_OURS)
    values = {"files": {name: _sha256(directory / name) for name in names}, "splits": dict(shard_lengths)}
    write_whole(directory / HASHES, json.dumps(values, indent=1).encode())


def checked(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Where a file lies; ConfigError where it is not what the preparation wrote."""
    path, noted = directory / name, _noted(directory)
    if noted is not None and path.is_file():
        require(
            _sha256(path) == noted["files"].get(name),
            f"{path} was changed: its SHA-256 is not that in {HASHES}; prepare the dataset anew",
        )
    return path


def require_lengths(directory: pathlib.Path, shard_lengths: Mapping[str, list[int]]) -> None:
    """ConfigError where the shards are said to have other numbers of blocks than were written."""
    noted = _noted(directory)
    require(
        noted is None or noted["splits"] == shard_lengths,
        f"{directory}/dataset_info.json was changed: it has other shards than {HASHES}; prepare the dataset anew",
    )


def _noted(directory: pathlib.Path) -> dict[str, Any] | None:
    path = directory / HASHES
    if not path.is_file():
        _say_unchecked(directory)
        return None
    try:
        noted = json.loads(path.read_text())
        return {"files": dict(noted["files"]), "splits": dict(noted["splits"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}; prepare the dataset anew") from error


@functools.cache
def _say_unchecked(directory: pathlib.Path) -> None:
    if (directory / "dataset_info.json").exists():
        _LOG.warning("%s has no %s, as an older version prepared it: its files are read unchecked", directory, HASHES)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
