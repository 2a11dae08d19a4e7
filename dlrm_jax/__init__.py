"""DLRM in JAX. Read in this order: config, batch, model, step, embedding, sparse_optimizer, loop."""

from dlrm_jax import interrupts as _interrupts

if _interrupts.runs_a_command():  # Its modules take seconds to load, in which Ctrl-C would leave a traceback.
    _interrupts.end_at_once()
