"""Eight CPU devices, no silent broadcasting between ranks, the same examples from hypothesis in every run."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# `HYPOTHESIS_PROFILE=explore python -m pytest tests/fuzz_test.py` looks for new failures; what it finds becomes a test.
hypothesis.settings.register_profile("repeat", derandomize=True)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
