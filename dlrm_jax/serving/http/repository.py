"""The version that answers, and how a newer one takes its place.

A whole version is loaded beside it, checked, then swapped. A delta of the version that answers is read and checked
beside it, then written into its weights between two batches. Where a delta cannot be, the version before it goes on
until there is a whole one: the deltas behind it change what never was.
"""

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from dlrm_jax.config import ConfigError, differences, tell
from dlrm_jax.host import heap
from dlrm_jax.serving.artifact.loaded import Servable
from dlrm_jax.serving.artifact.store import Version, newest_whole, open_alone, open_version, parent_of, versions
from dlrm_jax.serving.http.telemetry import Telemetry, log

Loader = Callable[[Version, Servable | None], Servable]
Result = TypeVar("Result")
Between = Callable[[Callable[[], Servable]], Awaitable[Servable]]
"""Does a piece of work while no batch is scored (batching.Batcher.between)."""
State = list[tuple[str, int, int]]
"""Files of a version: name, bytes, nanoseconds of the last change."""

_LOAD_SECONDS = 300.0
_LOAD_BYTES_PER_SECOND = 20e6
"""A version that is not ready by then never will be: what the slowest disk and the slowest compilation take."""


class Repository:
    """Follows a model directory, which it only reads."""

    def __init__(
        self,
        model_dir: pathlib.Path,
        load: Loader,
        telemetry: Telemetry,
        poll_seconds: float,
        between: Between = asyncio.to_thread,
    ) -> None:
        self._model_dir, self._load, self._telemetry, self._poll = model_dir, load, telemetry, poll_seconds
        self._between, self._in_time = between, _Loading()
        self.current: Servable | None = None
        self.refused: dict[int, str] = {}
        """Newer versions that were not taken, and why."""
        self._tried: dict[int, State] = {}
        self._task: asyncio.Task[None] | None = None
        self._look = asyncio.Event()

    def start(self, first: Version, refused: dict[int, str], failed: Callable[[BaseException], None]) -> None:
        """Load the first version, in the background, then follow. `failed` is told why there is nothing to serve.

        `refused` are newer versions, and why they are not served.
        """
        self._note(refused)
        self._task = asyncio.create_task(self._follow(first))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                failed(error)

        self._task.add_done_callback(ended)

    async def stop(self) -> None:
        """Follow no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def look_now(self) -> None:
        """Look for a newer version without waiting for the next poll."""
        self._look.set()

    async def _follow(self, first: Version) -> None:
        self._take(await self._first_ready(first))
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll):
                    await self._look.wait()
            self._look.clear()
            try:
                await self._reload()
            except Exception as error:  # As a directory that goes while it is read: the present version goes on.
                log("look_failed", level=logging.WARNING, reason=" ".join(str(error).split()) or repr(error))

    async def _reload(self) -> None:
        """Take the newest whole version, and after it one delta after the other."""
        taken = False
        while True:
            current = self.current
            assert current is not None
            if taken:  # By now nobody holds the one before.
                await asyncio.to_thread(heap.give_back)
            newer = await self._in_time(self._model_dir, _LOAD_SECONDS, self._newer, current.version.number)
            self.refused = {number: why for number, why in self.refused.items() if number in {n.number for n in newer}}
            taken = await self._take_one_of(newer, current)
            if not taken:
                return

    async def _take_one_of(self, newer: list["_Newer"], current: Servable) -> bool:
        """Whether one of the versions that are `newer`, the newest first, took the place of the present one."""
        whole = [one for one in newer if one.parent is None]
        deltas = [one for one in reversed(newer) if one.parent is not None]
        for one in whole:
            if self._tried.get(one.number) != one.state and await self._tried_to(self._load_whole, one, current):
                return True
        for one in deltas:
            if one.parent == current.version.number and self._tried.get(one.number) != one.state:
                return await self._tried_to(self._change, one, current)
        said = any(one.number in self.refused for one in deltas)
        for one in deltas:
            if one.parent != current.version.number and one.number not in self.refused:
                reason = f"it changes version {one.parent}, and {current.version.number} is served"
                self._say(one.number, f"{reason}: a whole version is waited for", silently=said)
                said = True  # Of a chain that is broken the first link is said.
        return False

    async def _tried_to(self, take: Callable[..., Awaitable[None]], one: "_Newer", current: Servable) -> bool:
        try:
            await take(one, current)
            return True
        except Exception as error:  # Whatever is wrong with a new version, the present one goes on.
            self._refuse(one.number, error, one.state)
            return False

    async def _load_whole(self, one: "_Newer", current: Servable) -> None:
        directory = self._model_dir / str(one.number)
        self._take(await self._in_time(directory, _seconds_for(one.state), self._open, one.number, current))

    async def _change(self, one: "_Newer", current: Servable) -> None:
        def prepared() -> Callable[[], Servable]:
            return current.changed_by(open_alone(self._model_dir, one.number))

        apply = await self._in_time(self._model_dir / str(one.number), _seconds_for(one.state), prepared)
        seconds: list[float] = []

        def timed() -> Servable:
            start = time.perf_counter()
            try:
                return apply()
            finally:
                seconds.append(time.perf_counter() - start)

        servable = await self._between(timed)
        self._take(servable, pause_ms=round(seconds[0] * 1e3, 3))

    def _newer(self, present: int) -> list["_Newer"]:
        """Versions after `present`, the newest first."""
        numbers = [number for number in reversed(versions(self._model_dir)) if number > present]
        return [_Newer(number, self._parent(number), _state(self._model_dir / str(number))) for number in numbers]

    def _note(self, refused: dict[int, str]) -> None:
        """Of what is not whole at the start: a delta may be, once what it changes is there."""
        said = False
        for number, reason in sorted(refused.items()):
            if self._parent(number) is None:
                self._refuse(number, reason, _state(self._model_dir / str(number)))
            else:  # Of a chain that is broken the first link is said.
                self._say(number, reason, silently=said)
                said = True

    def _parent(self, number: int) -> int | None:
        """What a version changes; None too for one without a manifest that can be read."""
        with contextlib.suppress(ConfigError, OSError):
            return parent_of(self._model_dir, number)
        return None

    def _refuse(self, number: int, error: Exception | str, state: State) -> None:
        """Note and tell that a version, as it lies there, is not served."""
        self._tried[number] = state
        self._say(number, " ".join(str(error).split()) or repr(error))

    def _say(self, number: int, reason: str, silently: bool = False) -> None:
        self.refused[number] = reason
        if not silently:
            self._telemetry.refused()
            log("reload_refused", level=logging.WARNING, version=number, reason=reason)

    async def _first_ready(self, first: Version) -> Servable:
        """The first version, or the next older one where that cannot be loaded or scores otherwise than at export."""
        failure: Exception | None = None
        while True:
            state = await asyncio.to_thread(_state, first.directory)
            try:
                return await self._in_time(first.directory, _seconds_for(state), self._ready, first, None)
            except Exception as error:
                failure = failure or error
                try:
                    older, refused = await asyncio.to_thread(newest_whole, self._model_dir, first.number)
                except ConfigError:
                    raise failure from None
                self._refuse(first.number, error, state)
                self._note(refused)
                first = older

    def _open(self, number: int, current: Servable) -> Servable:
        return self._ready(open_version(self._model_dir, number), current)

    def _ready(self, version: Version, like: Servable | None) -> Servable:
        servable = self._load(version, like)
        if like is not None:
            changed = differences(servable.signature.interface(), like.signature.interface())
            if changed:
                raise ConfigError(f"its schema differs (new != present): {tell(changed)}")
        servable.self_check()
        servable.warm_up()
        return servable

    def _take(self, servable: Servable, **facts: Any) -> None:
        self.current = servable
        version = servable.version
        self._telemetry.loaded(version.number, _updated(version.manifest))
        self._tried = {number: state for number, state in self._tried.items() if number > version.number}
        self.refused = {number: why for number, why in self.refused.items() if number > version.number}
        log("model_ready", model=servable.signature.name, version=version.number, **facts)


@dataclasses.dataclass(frozen=True)
class _Newer:
    """A version in the directory, the one that it changes if it is a delta, and how it lies there."""

    number: int
    parent: int | None
    state: State


def _updated(manifest: dict[str, Any]) -> dict[str, float]:
    """When the first and the last update were made that a version has and the one before it had not, if it says so."""
    said = manifest.get("updated")
    if not isinstance(said, dict) or said.keys() != {"first", "last"}:
        return {}
    return said if all(isinstance(then, float) for then in said.values()) else {}


_Jobs = queue.SimpleQueue[Callable[[], None] | None]


class _Loading:
    """A thread in which versions are read: one for all, as each thread's heap keeps what it once took.

    Nobody waits for it once the time of a version, or of this process, is over: another then takes its place.
    """

    def __init__(self) -> None:
        self._work: _Jobs | None = None

    async def __call__(
        self, directory: pathlib.Path, seconds: float, work: Callable[..., Result], *args: Any
    ) -> Result:
        """What `work` gives; ConfigError after `seconds`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def tell(take: Callable[[Any], None], what: Any) -> None:
            def told() -> None:
                if not future.done():
                    take(what)

            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody asks any more.
                loop.call_soon_threadsafe(told)

        def run() -> None:
            try:
                tell(future.set_result, work(*args))
            except BaseException as error:
                tell(future.set_exception, error)

        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(target=_work_off, args=(self._work,), daemon=True, name="load").start()
        self._work.put(run)
        try:
            # Python 3.11's `wait_for` loses a cancellation that comes just behind the result: `stop` would never end.
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            if self._work is not None:
                self._work.put(None)
            self._work = None
            raise ConfigError(f"{directory} was not ready after {seconds:.0f} s; export the model anew") from None


def _work_off(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # It holds the version before.


def _seconds_for(state: State) -> float:
    """How long loading a version may take."""
    return _LOAD_SECONDS + sum(size for _, size, _ in state) / _LOAD_BYTES_PER_SECOND


def _state(directory: pathlib.Path) -> State:
    """What changes when a refused version is mended, or was only half copied."""
    found = []
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def describe(servable: Servable) -> dict[str, Any]:
    """A version for a person."""
    signature, manifest = servable.signature, servable.version.manifest
    return {
        "name": signature.name,
        "version": servable.version.number,
        "step": manifest.get("step"),
        "tables": signature.kind,
        "table_bytes": manifest.get("table_bytes"),
        "metrics": servable.metrics,
        "dense": list(signature.dense_names),
        "features": [
            {"name": f.name, "table": f.table, "rows": f.rows, "hotness": f.hotness} for f in signature.features
        ],
        "columns": list(servable.reader.columns),
        "raw": signature.schema is not None,
    }
