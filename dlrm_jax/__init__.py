"""DLRM in JAX.

Reading order: what decides a model (config), what flows (data/batch), the dense model (model/dlrm, model/interactions),
the tables (tables/forms/base, tables/rules, tables/updates, tables/exchange), the step that joins them (training/step),
the run (training/loop), an exported model (serving/artifact/loaded).
"""

import os as _os
import resource as _resource

from dlrm_jax.host import interrupts as _interrupts

if _interrupts.runs_a_command():  # Its modules take seconds to load, in which Ctrl-C would leave a traceback.
    _interrupts.end_at_once()
    if _resource.getrlimit(_resource.RLIMIT_AS)[0] != _resource.RLIM_INFINITY:
        # Arrow's usual allocator begins by reserving 1 GB of addresses; it looks here when it is imported.
        _os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
