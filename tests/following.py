"""A repository of versions that follows a directory, in the test's own event loop."""

import asyncio
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from dlrm_jax.serving.artifact.store import newest_whole
from dlrm_jax.serving.http.repository import Repository
from dlrm_jax.serving.http.telemetry import Telemetry


class Following:
    """A repository that loads versions by a function, for the length of a block."""

    def __init__(self, model_dir: pathlib.Path, load: Callable) -> None:
        self.repository, self.model_dir = Repository(model_dir, load, Telemetry(), poll_seconds=0.01), model_dir

    async def __aenter__(self) -> "Following":
        self.repository.start(*newest_whole(self.model_dir), failed=pytest.fail)
        await self.until(lambda: self.repository.current is not None)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.repository.stop()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait until it holds; pytest-timeout ends what hangs."""
        while not condition():
            await asyncio.sleep(0.01)

    async def serves(self, number: int) -> None:
        """Wait until that version answers."""
        await self.until(lambda: self.repository.current.version.number == number)
