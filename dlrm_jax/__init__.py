"""DLRM in JAX.

    prepared = dlrm_jax.prepare(frame, "data/mine")     a log, in files or in memory, to a dataset
    run = dlrm_jax.train(prepared, "runs/mine")         a dataset to a trained model
    run.evaluate("test"), run.predict(frame)            docs/PYTHON.md has the rest, step by step

Reading order: what decides a model (config), what flows (data/batch), the dense model (model/dlrm, model/interactions),
the tables (tables/forms/base, tables/rules, tables/updates, tables/exchange), the step that joins them (training/step),
the run (training/loop), an exported model (serving/artifact/loaded).
"""

import importlib as _importlib
import os as _os
import resource as _resource
import sys as _sys
import types as _types
import typing as _typing

from dlrm_jax.host import interrupts as _interrupts

if _typing.TYPE_CHECKING:
    from dlrm_jax.api.evaluation import Evaluation
    from dlrm_jax.api.exported_model import Model
    from dlrm_jax.api.loading import load
    from dlrm_jax.api.planning import Plan, plan
    from dlrm_jax.api.preparing import Prepared, prepare
    from dlrm_jax.api.run import Run
    from dlrm_jax.api.training import train
    from dlrm_jax.config import ConfigError

__all__ = ["ConfigError", "Evaluation", "Model", "Plan", "Prepared", "Run", "load", "plan", "prepare", "train"]

_HOMES = {
    "ConfigError": "config.errors",
    "Evaluation": "api.evaluation",
    "Model": "api.exported_model",
    "Plan": "api.planning",
    "Prepared": "api.preparing",
    "Run": "api.run",
    "load": "api.loading",
    "plan": "api.planning",
    "prepare": "api.preparing",
    "train": "api.training",
}


class _Package(_types.ModuleType):
    """This package: its names are loaded when they are first asked for, as most take JAX.

    `train`, `prepare` and `plan` are functions here, and modules of commands. Whoever imports such a module makes
    Python set it as an attribute of the package, which would hide the function: that is left out.
    """

    def __getattr__(self, name: str) -> _typing.Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: _typing.Any) -> None:
        if not (name in _HOMES and isinstance(value, _types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


_sys.modules[__name__].__class__ = _Package

if _interrupts.runs_a_command():  # Its modules take seconds to load, in which Ctrl-C would leave a traceback.
    _interrupts.end_at_once()
    if _resource.getrlimit(_resource.RLIMIT_AS)[0] != _resource.RLIM_INFINITY:
        # Arrow's usual allocator begins by reserving 1 GB of addresses; it looks here when it is imported.
        _os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
