"""The readers of formats that others add: functions `(paths, schema) -> Source` by the name of their format.

A schema's `format:` names one; docs/ADDING.md has an example. Those of this package are in open_log.py.
"""

from collections.abc import Callable
from typing import Any

from dlrm_jax.host.registry import Registry

READERS: Registry[Callable[[tuple[str, ...], Any], Any]] = Registry("format", "dlrm_jax.formats")
register = READERS.register
