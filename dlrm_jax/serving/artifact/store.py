"""MODEL_DIR/<n>/: versions of an exported model, each whole or absent, each file with its hash.

A version may be a delta (deltas.py): its manifest names another version as its `parent`, by number and by the hash of
that one's manifest, and it holds what is other than there. What it does not hold is read of its parent, and so on.
"""

import contextlib
import dataclasses
import functools
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
    sha256: str = ""
    """Of its manifest."""
    parent: "Version | None" = None
    """What a delta changes; None for a whole version, and for a delta that was opened by itself."""

    @property
    def changes(self) -> tuple[int, str] | None:
        """(number, hash of the manifest) of the version that this one changes; None for a whole version."""
        said = self.manifest.get("parent")
        return None if said is None else (said["version"], said["sha256"])

    @functools.cached_property
    def chain(self) -> tuple["Version", ...]:
        """The whole version that this one comes of, and the deltas up to this one, each by itself."""
        found, link = [], self
        while link.parent is not None:
            found.append(dataclasses.replace(link, parent=None))
            link = link.parent
        return (link, *reversed(found))

    def owns(self, name: str) -> bool:
        """Whether there is such a file here; of one that is still being written there is no manifest yet."""
        files = self.manifest.get("files")
        return (files is None or name in files) and (self.directory / name).is_file()

    def has(self, name: str) -> bool:
        """Whether there is such a file, here or in what this version changes."""
        return any(link.owns(name) for link in self.chain)

    def path(self, name: str) -> pathlib.Path:
        """Where a file lies; ConfigError for one that the manifest does not name, and that nobody checked."""
        for link in reversed(self.chain):
            if link.owns(name):
                return link.directory / name
        raise ConfigError(f"{self.directory / name} is not in the manifest, or missing; export the model anew")

    def read_json(self, name: str) -> Any:
        """A JSON file of the version."""
        return _read_json(self.path(name))

    def require_unchanged(self) -> None:
        """ConfigError for a file that was changed since its hash was taken: what was read of it is not known."""
        for link in self.chain:
            for name, then in link.seen.items():
                path = link.directory / name
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
        text = (json.dumps(manifest, indent=1) + "\n").encode()
        (new / MANIFEST).write_bytes(text)
        for path in (new / MANIFEST, new):
            _sync(path)
        new.rename(model_dir / str(number))
        _sync(model_dir)
    return Version(number, model_dir / str(number), manifest, sha256=hashlib.sha256(text).hexdigest())


def prune(model_dir: pathlib.Path, keep: int) -> list[int]:
    """Delete versions before the last `keep` whole ones; which. What the newest version changes always stays.

    From the newest of them down, so that what is still there has all that it changes, whenever this is stopped.
    """
    for left in model_dir.glob(".gone-*"):
        shutil.rmtree(left, ignore_errors=True)
    parents: dict[int, int | None] = {}
    for number in versions(model_dir):
        with contextlib.suppress(ConfigError, OSError):  # What cannot be read is no version, and keeps none.
            parents[number] = parent_of(model_dir, number)
    whole = [number for number, parent in parents.items() if parent is None]
    first, stays, link = whole[-keep:][0] if whole else 0, set(), max(parents, default=None)
    while link is not None and link not in stays:
        stays.add(link)
        link = parents.get(link)
    gone = [number for number in reversed(versions(model_dir)) if number < first and number not in stays]
    for number in gone:
        left = model_dir / f".gone-{number}"
        (model_dir / str(number)).rename(left)
        shutil.rmtree(left, ignore_errors=True)
    return gone


def versions(model_dir: pathlib.Path) -> list[int]:
    """Numbers of the versions in a directory, in order."""
    if not model_dir.is_dir():
        return []
    return sorted(int(path.name) for path in model_dir.iterdir() if path.name.isdecimal() and path.is_dir())


def newest_whole(model_dir: pathlib.Path, below: int | None = None) -> tuple[Version, dict[int, str]]:
    """The newest version that is whole (older than `below`), with all that it changes if it is a delta.

    And what is wrong with newer ones; ConfigError if none is. A version may be there and not be whole: half copied,
    damaged, an empty directory.
    """
    refused: dict[int, str] = {}
    opened = functools.cache(functools.partial(open_alone, model_dir))
    for number in reversed(versions(model_dir)):
        if below is not None and number >= below:
            continue
        try:
            return with_parents(opened(number), opened), refused
        except (ValueError, OSError) as error:
            refused[number] = " ".join(str(error).split())
    if not refused:
        raise ConfigError(f"{model_dir} holds no model version; python -m dlrm_jax.export --out={model_dir} writes one")
    if len(refused) == 1:
        raise ConfigError(next(iter(refused.values())))
    listing = "; ".join(f"{number}: {reason}" for number, reason in list(refused.items())[:3])
    raise ConfigError(f"none of the {len(refused)} versions in {model_dir} is whole: {listing}")


def open_version(model_dir: pathlib.Path, number: int | None = None) -> Version:
    """Version `number`, or the newest whole one; ConfigError naming the file that is missing, cut or changed.

    A delta comes with all that it changes.
    """
    if number is not None:
        opened = functools.partial(open_alone, model_dir)
        return with_parents(opened(number), opened)
    version, refused = newest_whole(model_dir)
    for other, reason in refused.items():
        _LOG.warning("version %d is not used, but %d: %s", other, version.number, reason)
    return version


def with_parents(version: Version, opened: Callable[[int], Version]) -> Version:
    """A version with all that it changes, which `opened` gives by number; ConfigError where that is not there."""
    links = [version]
    while (parent := links[-1].changes) is not None:
        try:
            found = opened(parent[0])
        except ConfigError as error:
            raise ConfigError(f"{links[-1].directory} changes version {parent[0]}: {error}") from error
        if found.sha256 != parent[1]:
            raise ConfigError(
                f"{links[-1].directory} changes another version {parent[0]} than that in {found.directory}: the hash "
                "of its manifest differs; export a whole version"
            )
        links.append(found)
    whole = links.pop()
    return functools.reduce(lambda before, link: dataclasses.replace(link, parent=before), reversed(links), whole)


def open_alone(model_dir: pathlib.Path, number: int) -> Version:
    """Version `number`, its own files checked; of a delta not what it changes."""
    known = versions(model_dir)
    if number not in known:
        raise ConfigError(f"{model_dir} has no version {number}; it has {', '.join(map(str, known))}")
    directory = model_dir / str(number)
    (manifest, sha256), seen = _read_manifest(directory / MANIFEST), {}
    if "parent" in manifest and manifest["parent"]["version"] >= number:
        parent = manifest["parent"]["version"]
        raise ConfigError(f"{directory} changes version {parent}, which is none before it; export a whole version")
    for name, facts in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; export the model anew")
        seen[name] = _identity(path.stat())
        if path.stat().st_size != facts["bytes"]:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes, not {facts['bytes']}; export the model anew")
        if _sha256(path) != facts["sha256"]:
            raise ConfigError(f"{path} was changed: its SHA-256 is not the manifest's; export the model anew")
    version = Version(number, directory, manifest, seen, sha256)
    version.require_unchanged()
    return version


def parent_of(model_dir: pathlib.Path, number: int) -> int | None:
    """The version that version `number` changes, by its manifest alone; None for a whole version."""
    parent = _read_manifest(model_dir / str(number) / MANIFEST)[0].get("parent")
    return None if parent is None else parent["version"]


def _read_manifest(path: pathlib.Path) -> tuple[dict[str, Any], str]:
    """(the manifest, its hash)."""
    text = _read_text(path)
    manifest = _parsed(path, text)
    try:
        found = manifest["format_version"]
        files = {str(name): (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        parent = manifest.get("parent", {"version": 1, "sha256": ""})
        well = type(parent["version"]) is int and parent["version"] >= 1 and isinstance(parent["sha256"], str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a manifest: {' '.join(str(error).split())}; export the model anew") from error
    if found != FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {found!r}; this program reads {FORMAT_VERSION}")
    if not files or any(".." in pathlib.PurePath(name).parts or name.startswith("/") for name in files):
        raise ConfigError(f"{path} names no files, or files outside its directory; export the model anew")
    if not well:
        raise ConfigError(f"{path} is not a manifest: its parent is no version; export a whole version")
    return manifest, hashlib.sha256(text).hexdigest()


def _read_json(path: pathlib.Path) -> Any:
    return _parsed(path, _read_text(path))


def _read_text(path: pathlib.Path) -> bytes:
    try:
        with open_regular(path) as file:
            text = file.read(_MOST_JSON_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; export the model anew") from None
    except OSError as error:
        raise ConfigError(f"{path} is not a whole file of JSON: {error}; export anew") from error
    if len(text) > _MOST_JSON_BYTES:
        raise ConfigError(f"{path} has more than {_MOST_JSON_BYTES} bytes; export the model anew")
    return text


def _parsed(path: pathlib.Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
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
