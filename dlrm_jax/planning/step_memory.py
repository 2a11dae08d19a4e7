"""What a step holds besides the state: the most of its temporaries that live at one time, on one device.

Counted from how XLA orders a step on a CPU: a layer's outputs are kept, before and after its ReLU, until the backward
pass has come to it, and what the tables' update needs of the ids is there before it. So the most is at one layer, at
the interaction, or at the tables, whatever else the step does.
"""

import itertools

from dlrm_jax.config import BATCH_NORM, LAYER_NORM, NO_NORM, HiddenConfig, ModelConfig
from dlrm_jax.model import interactions
from dlrm_jax.planning.dense_work import dense_work
from dlrm_jax.tables.forms.base import Work

_OF_A_GRADIENT = 2.25
"""Arrays of a kernel's size where its gradient is made: it, what becomes of the kernel, and whether it is finite."""
_OF_NORM = {NO_NORM: 0.0, BATCH_NORM: 1.2, LAYER_NORM: 3.0}
_OF_ACTIVATION = {"relu": 0.0, "gelu": 2.0, "silu": 1.0, "prelu": 1.0}
_OF_DROPOUT = 0.15
"""Arrays of a hidden layer's size that each keeps for the backward pass, beside those before and after a ReLU. Dropout
keeps little, and of a batch in parts nothing: its draws are hashes, made again where they are needed."""


def pooled_floats(model: ModelConfig) -> int:
    """Floats of an example's pooled vectors."""
    return sum(model.table(lookup.part.table).embedding_dim for lookup in model.lookups)


def step_floats(model: ModelConfig, works: list[Work], examples: int, num_micro_batches: int) -> tuple[int, int]:
    """(floats of the dense model, floats of the tables) that live together when most are alive.

    `examples` are a device's own in a step.
    """
    pooled = examples * pooled_floats(model)
    whole = num_micro_batches == 1
    dense = _dense(model, examples // num_micro_batches, pooled, whole)
    unfinished = examples * _saved_of_bottom(
        model, whole
    )  # When the tables are updated, which may be before it is through.
    if not whole:  # The parts of what goes in, gradients of the pooled vectors, and sums of the others.
        dense += 2 * pooled + examples * (model.num_dense + 2) + dense_work(model).parameters
        unfinished = 0
    if any(work.stack.num_devices > 1 for work in works):
        # The gradients that are summed over devices, in one array and out of another.
        dense = max(dense, 2 * dense_work(model).parameters + pooled)
    memory = [work.stack.form.memory(work) for work in works]
    held = sum(own for own, _ in memory)
    moments = [(dense, held)]
    for work, (own, most) in zip(works, memory, strict=True):
        if work.learned:  # A slot's row is kept with its gradient, before and after it is scaled.
            most = work.slots * (5 * work.stack.width + 12)
        moments.append((pooled + unfinished * work.stack.form.updates_early, held - own + most))
    return max(moments, key=sum)


def _dense(model: ModelConfig, examples: int, pooled: int, whole: bool) -> int:
    """The most that the dense model's passes hold at once, in floats; `examples` are a `whole` batch's, or a part's."""
    interaction = model.interaction
    top, bottom, width = model.top_mlp, model.bottom_mlp, dense_work(model).interaction_width
    vectors, saved = model.num_vectors, _saved_of_bottom(model, whole)
    of_hidden, of_bottoms = _kept(model.top_hidden, whole), _kept(model.bottom_hidden, whole)
    joined = vectors * model.embedding_dim
    embedded = len(model.embedded) * model.embedding_dim  # Beside where they are joined.
    below_top = saved + joined + embedded + (width if interaction.name == "dot" else 0)
    options = interactions.complete(interaction).options
    crosses = options.get("cross_layers", 0)
    below_top += crosses * (2 * width + options.get("cross_rank", 0))
    widths = [*([(model.num_dense, *bottom)] if bottom else []), (width, *top)]
    kernels = [i * o for mlp in widths for i, o in itertools.pairwise(mlp)]
    of_bottom, of_top = kernels[: len(bottom)], kernels[len(bottom) :]
    moments = []
    for j, (output, below) in enumerate(zip(top, (width, *top[:-1]), strict=True)):
        arriving = below if output > 1 else 0  # Of one output the gradient is multiplied out where it is read.
        moments.append(examples * (below_top + of_hidden * sum(top[:j]) + output + arriving) + sum(kernels))
        kept = below_top + of_hidden * sum(top[: max(j - 1, 0)]) + (below if j else 0)
        others = sum(of_bottom[1:]) + sum(of_top[:j])
        moments.append(examples * kept + others + int(_OF_A_GRADIENT * of_top[j]))
    if interaction.name == "dot":
        moments.append(examples * (saved + 2 * (joined + embedded) + vectors**2 + width) + sum(kernels))
    elif crosses:
        moments.append(examples * (below_top + 2 * joined) + sum(kernels))
    for j, output in enumerate(bottom):
        kept = of_bottoms * sum(bottom[:j]) + output + (bottom[j - 1] if j else 0)
        moments.append(examples * kept + pooled + sum(of_bottom[1:j]) + int(_OF_A_GRADIENT * of_bottom[j]))
    return int(max(moments))


def _saved_of_bottom(model: ModelConfig, whole: bool) -> int:
    """Floats an example that the bottom MLP keeps; its last layer's output goes on to the interaction."""
    return int(_kept(model.bottom_hidden, whole) * sum(model.bottom_mlp[:-1])) + sum(model.bottom_mlp[-1:])


def _kept(hidden: HiddenConfig, whole: bool) -> float:
    """Floats that a hidden layer keeps for each of its outputs until the backward pass has come to it."""
    return 2 + _OF_NORM[hidden.norm] + _OF_ACTIVATION[hidden.activation] + _OF_DROPOUT * (whole and hidden.dropout > 0)
