"""The dense model in numbers: its layers, widths and parameters."""

import itertools

from dlrm_jax.config import ModelConfig


def dense_parameters(model: ModelConfig) -> int:
    """Floats of the MLPs and the interaction."""
    return sum((i + 1) * o for i, o in layers(model)) + cross_parameters(model)


def layers(model: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of each layer of the MLPs, the bottom one's first."""
    bottom = [model.num_dense, *model.bottom_mlp]
    top = [interaction_width(model), *model.top_mlp]
    return [*itertools.pairwise(bottom), *itertools.pairwise(top)]


def interaction_width(model: ModelConfig) -> int:
    """Inputs of the top MLP."""
    vectors, dim = len(model.features) + 1, model.embedding_dim
    if model.interaction == "dot":
        return dim + vectors * (vectors - 1) // 2 + (vectors if model.self_interaction else 0)
    return vectors * dim


def cross_parameters(model: ModelConfig) -> int:
    """Floats of the cross layers, 0 without."""
    width = interaction_width(model)
    return model.cross_layers * (2 * width * model.cross_rank + width) if model.interaction == "cross" else 0
