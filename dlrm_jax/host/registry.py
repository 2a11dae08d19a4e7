"""Things by name that others may add: a registry a kind, filled by this package, a program, and installed packages."""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from dlrm_jax.config import ConfigError, require, require_choice

T = TypeVar("T")
C = TypeVar("C")


class Registry(Generic[T]):
    """What there is of a kind, by name. `group` are the entry points under which an installed package names its own."""

    def __init__(self, kind: str, group: str, fits: Callable[[Any], bool] = callable, what: str = "callable") -> None:
        """`fits` says whether a thing is of the kind, `what` in words what that is."""
        self._kind, self._group, self._fits, self._what = kind, group, fits, what
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """A decorator that makes a thing known as `name`."""

        def add(thing: C) -> C:
            self._known[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def all(self) -> dict[str, T]:
        """Everything by name; ConfigError for an entry point that cannot be imported, or is of another kind."""
        for point in _entry_points(self._group):
            if point.name not in self._known:
                self._known[point.name] = self._load(point)
        return dict(self._known)

    def get(self, name: str) -> T:
        """The thing called `name`; ConfigError naming what there is."""
        known = self.all()
        require_choice(self._kind, name, tuple(known))
        return known[name]

    def _load(self, point: importlib.metadata.EntryPoint) -> T:
        what = f"{self._kind} {point.name!r}, which an installed package names as {point.value},"
        try:
            thing = point.load()
        except Exception as error:  # Whatever another's module does.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError(f"{what} cannot be imported: {reason}; mend or uninstall that package") from error
        require(self._fits(thing), f"{what} is not a {self._what}")
        found: T = thing
        return found


@functools.cache
def _entry_points(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))
