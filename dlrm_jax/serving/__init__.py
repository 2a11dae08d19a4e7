"""Serving: a trained model as a directory of its own, loaded with jax and numpy alone, and a server around it."""

from dlrm_jax.serving.artifact.loaded import Servable, load

__all__ = ["Servable", "load"]
