"""DLRM in JAX.

Reading order: what decides a model (config), what flows (data/batch), the dense model (model/dlrm, model/interactions),
the tables (tables/layout, tables/rules, tables/updates, tables/exchange), the step that joins them (training/step),
the run (training/loop), an exported model (serving/artifact/loaded).
"""

from dlrm_jax.host import interrupts as _interrupts

if _interrupts.runs_a_command():  # Its modules take seconds to load, in which Ctrl-C would leave a traceback.
    _interrupts.end_at_once()
