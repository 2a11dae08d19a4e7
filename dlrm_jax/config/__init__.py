"""The nouns of a run, as frozen dataclasses: what they are made of, their checks, and JSON in and out."""

from dlrm_jax.config.difference import differences, tell
from dlrm_jax.config.errors import ConfigError, how_to_install, require, require_choice, require_unique
from dlrm_jax.config.learning import LossConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.config.model import (
    DOT,
    EMPTY_SLOT,
    DenseConfig,
    FeatureConfig,
    InteractionConfig,
    Lookup,
    ModelConfig,
    Options,
    Part,
    TableConfig,
    model_from_dict,
    nested_interaction,
)
from dlrm_jax.config.settings import Needs, Setting, check_settings, setting, settings
from dlrm_jax.config.values import from_dict, to_dict

__all__ = [
    "DOT",
    "EMPTY_SLOT",
    "ConfigError",
    "DenseConfig",
    "FeatureConfig",
    "InteractionConfig",
    "Lookup",
    "LossConfig",
    "ModelConfig",
    "Needs",
    "OptimizerConfig",
    "Options",
    "Part",
    "ScheduleConfig",
    "Setting",
    "TableConfig",
    "check_settings",
    "differences",
    "from_dict",
    "how_to_install",
    "model_from_dict",
    "nested_interaction",
    "require",
    "require_choice",
    "require_unique",
    "setting",
    "settings",
    "tell",
    "to_dict",
]
