"""The bridge to the reference implementation (facebookresearch/dlrm): its weights, flags and trajectories."""

from dlrm_jax.compat.reference_flags import REFERENCE_FLAGS, ReferenceFlag, parse_reference_flags
from dlrm_jax.compat.replay import Replay, reference_configs, replay
from dlrm_jax.compat.torchrec import from_torchrec
from dlrm_jax.compat.weights import infer_model, load_reference_state, save_reference_state

__all__ = [
    "REFERENCE_FLAGS",
    "ReferenceFlag",
    "Replay",
    "from_torchrec",
    "infer_model",
    "load_reference_state",
    "parse_reference_flags",
    "reference_configs",
    "replay",
    "save_reference_state",
]
