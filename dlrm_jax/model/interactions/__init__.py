"""How dense and sparse features meet: one file an interaction, each a Flax module whose fields are its options.

Every file here is found by itself; docs/ADDING.md says how to add one from here, or from another package.
"""

import importlib
import pkgutil

from dlrm_jax.model.interactions.base import (
    Interaction,
    behind,
    complete,
    make,
    of_model,
    options_of,
    register,
    registered,
    side_by_side,
    stacked,
)

__all__ = [
    "Interaction",
    "behind",
    "complete",
    "make",
    "of_model",
    "options_of",
    "register",
    "registered",
    "side_by_side",
    "stacked",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
