"""The version that answers, and how a newer one takes its place: loaded beside it, checked, then swapped."""

import asyncio
import contextlib
import logging
import pathlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from dlrm_jax.config import ConfigError, differences, tell
from dlrm_jax.serving.artifact.loaded import Servable
from dlrm_jax.serving.artifact.store import Version, newest_whole, open_version, versions
from dlrm_jax.serving.http.telemetry import Telemetry, log

Loader = Callable[[Version, Servable | None], Servable]
Result = TypeVar("Result")
State = list[tuple[str, int, int]]
"""Files of a version: name, bytes, nanoseconds of the last change."""

_LOAD_SECONDS = 300.0
_LOAD_BYTES_PER_SECOND = 20e6
"""A version that is not ready by then never will be: what the slowest disk and the slowest compilation take."""


class Repository:
    """Follows a model directory, which it only reads."""

    def __init__(self, model_dir: pathlib.Path, load: Loader, telemetry: Telemetry, poll_seconds: float) -> None:
        self._model_dir, self._load, self._telemetry, self._poll = model_dir, load, telemetry, poll_seconds
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
        for number, reason in refused.items():
            self._refuse(number, reason, _state(self._model_dir / str(number)))
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
                await asyncio.wait_for(self._look.wait(), self._poll)
            self._look.clear()
            try:
                await self._reload()
            except Exception as error:  # As a directory that goes while it is read: the present version goes on.
                log("look_failed", level=logging.WARNING, reason=" ".join(str(error).split()) or repr(error))

    async def _reload(self) -> None:
        current = self.current
        assert current is not None
        newer = await _in_time(self._model_dir, _LOAD_SECONDS, self._newer, current.version.number)
        for number, state in newer:
            if self._tried.get(number) == state:
                continue
            try:
                directory = self._model_dir / str(number)
                self._take(await _in_time(directory, _seconds_for(state), self._open, number, current))
                self.refused = {refused: why for refused, why in self.refused.items() if refused > number}
                return
            except Exception as error:  # Whatever is wrong with a new version, the present one goes on.
                self._refuse(number, error, state)

    def _newer(self, present: int) -> list[tuple[int, State]]:
        """Versions after `present`, the newest first, and how they lie there."""
        numbers = [number for number in versions(self._model_dir) if number > present]
        return [(number, _state(self._model_dir / str(number))) for number in reversed(numbers)]

    def _refuse(self, number: int, error: Exception | str, state: State) -> None:
        """Note and tell that a version, as it lies there, is not served."""
        self._tried[number] = state
        self.refused[number] = " ".join(str(error).split()) or repr(error)
        self._telemetry.refused()
        log("reload_refused", level=logging.WARNING, version=number, reason=self.refused[number])

    async def _first_ready(self, first: Version) -> Servable:
        """The first version, or the next older one where that cannot be loaded or scores otherwise than at export."""
        failure: Exception | None = None
        while True:
            state = await asyncio.to_thread(_state, first.directory)
            try:
                return await _in_time(first.directory, _seconds_for(state), self._ready, first, None)
            except Exception as error:
                failure = failure or error
                try:
                    older, refused = await asyncio.to_thread(newest_whole, self._model_dir, first.number)
                except ConfigError:
                    raise failure from None
                self._refuse(first.number, error, state)
                for number, reason in refused.items():
                    self._refuse(number, reason, _state(self._model_dir / str(number)))
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

    def _take(self, servable: Servable) -> None:
        self.current = servable
        self._telemetry.loaded(servable.version.number)
        log("model_ready", model=servable.signature.name, version=servable.version.number)


async def _in_time(directory: pathlib.Path, seconds: float, work: Callable[..., Result], *args: Any) -> Result:
    """What `work` gives, on a thread that nobody waits for once its time, or this process, is over."""
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

    threading.Thread(target=run, daemon=True, name=f"load {directory.name}").start()
    try:
        return await asyncio.wait_for(future, seconds)
    except TimeoutError:
        raise ConfigError(f"{directory} was not ready after {seconds:.0f} s; export the model anew") from None


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
