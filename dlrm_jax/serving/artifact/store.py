"""MODEL_DIR/<n>/: versions of an exported model, each whole or absent, each file with its hash."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Callable
from typing import Any

from dlrm_jax.config import ConfigError
from dlrm_jax.host.files import one_at_a_time, try_lock_directory

_LOG = logging.getLogger("dlrm_jax")
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


_MOST_JSON_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Version:
    """A version whose files are as its manifest says, at the time when it was opened."""

    number: int
    directory: pathlib.Path
    manifest: dict[str, Any]
    seen: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """What tells of each checked file that it was changed since."""

    def has(self, name: str) -> bool:
        """Whether there is such a file; of one that is still being written there is no manifest yet."""
        files = self.manifest.get("files")
        return (files is None or name in files) and (self.directory / name).is_file()

    def path(self, name: str) -> pathlib.Path:
        """Where a file lies; ConfigError for one that the manifest does not name, and that nobody checked."""
        path = self.directory / name
        if not self.has(name):
            raise ConfigError(f"{path} is not in the manifest, or missing; export the model anew")
        return path

    def read_json(self, name: str) -> Any:
        """A JSON file of the version."""
        return _read_json(self.path(name))

    def require_unchanged(self) -> None:
        """ConfigError for a file that was changed since its hash was taken: what was read of it is not known."""
        for name, then in self.seen.items():
            path = self.directory / name
            try:
                now = _identity(path.stat())
            except OSError:
                now = ()
            if now != then:
                raise ConfigError(f"{path} was changed while it was read; export the model anew")


def write_version(model_dir: pathlib.Path, write: Callable[[pathlib.Path], None], facts: dict[str, Any]) -> Version:
    """Let `write` fill a directory, and make it the next version; nobody sees a part of it.

    `facts` go into the manifest beside the files' sizes and SHA-256 hashes.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    new, lock = _begin(model_dir)
    try:
        write(new)
        files = {}
        for path in sorted(path for path in new.rglob("*") if path.is_file()):
            files[str(path.relative_to(new))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in new.rglob("*"):
            _sync(path)
        new.chmod(0o755)  # mkdtemp's directory is for its owner alone; a server may run as somebody else.
        return _name(new, model_dir, facts, files)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _begin(model_dir: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """A new directory for a version, and the lock that says that somebody is writing it."""
    with one_at_a_time(model_dir):
        for left in model_dir.glob(".new-*"):
            descriptor = try_lock_directory(left)
            if descriptor is not None:  # By an export that was killed: nobody holds it.
                shutil.rmtree(left, ignore_errors=True)
                os.close(descriptor)
        # Resolved, as mkdtemp itself takes `link/..` away by its text.
        new = pathlib.Path(tempfile.mkdtemp(prefix=".new-", dir=model_dir.resolve()))
        return new, try_lock_directory(new)


def _name(new: pathlib.Path, model_dir: pathlib.Path, facts: dict[str, Any], files: dict[str, Any]) -> Version:
    """Give a written version the next free number."""
    with one_at_a_time(model_dir):
        taken = [int(path.name) for path in model_dir.iterdir() if path.name.isdecimal()]
        number = max(taken, default=0) + 1
        manifest = {"format_version": FORMAT_VERSION, "version": number, **facts, "files": files}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (new / MANIFEST, new):
            _sync(path)
        new.rename(model_dir / str(number))
        _sync(model_dir)
    return Version(number, model_dir / str(number), manifest)


def versions(model_dir: pathlib.Path) -> list[int]:
    """Numbers of the versions in a directory, in order."""
    if not model_dir.is_dir():
        return []
    return sorted(int(path.name) for path in model_dir.iterdir() if path.name.isdecimal() and path.is_dir())


def newest_whole(model_dir: pathlib.Path, below: int | None = None) -> tuple[Version, dict[int, str]]:
    """The newest version that is whole (older than `below`), and what is wrong with newer ones; ConfigError if none is.

    A version may be there and not be whole: half copied, damaged, an empty directory.
    """
    refused: dict[int, str] = {}
    for number in reversed(versions(model_dir)):
        if below is not None and number >= below:
            continue
        try:
            return open_version(model_dir, number), refused
        except (ValueError, OSError) as error:
            refused[number] = " ".join(str(error).split())
    if not refused:
        raise ConfigError(f"{model_dir} holds no model version; python -m dlrm_jax.export --out={model_dir} writes one")
    if len(refused) == 1:
        raise ConfigError(next(iter(refused.values())))
    listing = "; ".join(f"{number}: {reason}" for number, reason in list(refused.items())[:3])
    raise ConfigError(f"none of the {len(refused)} versions in {model_dir} is whole: {listing}")


def open_version(model_dir: pathlib.Path, number: int | None = None) -> Version:
    """Version `number`, or the newest whole one; ConfigError naming the file that is missing, cut or changed."""
    if number is None:
        version, refused = newest_whole(model_dir)
        for other, reason in refused.items():
            _LOG.warning("version %d is not used, but %d: %s", other, version.number, reason)
        return version
    known = versions(model_dir)
    if number not in known:
        raise ConfigError(f"{model_dir} has no version {number}; it has {', '.join(map(str, known))}")
    directory = model_dir / str(number)
    manifest, seen = _read_manifest(directory / MANIFEST), {}
    for name, facts in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; export the model anew")
        seen[name] = _identity(path.stat())
        if path.stat().st_size != facts["bytes"]:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes, not {facts['bytes']}; export the model anew")
        if _sha256(path) != facts["sha256"]:
            raise ConfigError(f"{path} was changed: its SHA-256 is not the manifest's; export the model anew")
    version = Version(number, directory, manifest, seen)
    version.require_unchanged()
    return version


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    manifest = _read_json(path)
    try:
        found = manifest["format_version"]
        files = {str(name): (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a manifest: {' '.join(str(error).split())}; export the model anew") from error
    if found != FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {found!r}; this program reads {FORMAT_VERSION}")
    if not files or any(".." in pathlib.PurePath(name).parts or name.startswith("/") for name in files):
        raise ConfigError(f"{path} names no files, or files outside its directory; export the model anew")
    return manifest


def _read_json(path: pathlib.Path) -> Any:
    try:
        with open_regular(path) as file:
            text = file.read(_MOST_JSON_BYTES + 1)
        if len(text) > _MOST_JSON_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_JSON_BYTES} bytes; export the model anew")
        return json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; export the model anew") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a whole file of JSON: {' '.join(str(error).split())}; export anew") from error


def open_regular(path: pathlib.Path) -> io.BufferedReader:
    """A file for reading; ConfigError for a pipe or a device, whose end might never come."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is not a regular file; export the model anew")
    return os.fdopen(descriptor, "rb")


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _sha256(path: pathlib.Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
