"""What the dense model has and does for one example, read from its traced program: no list of layers stands here."""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from dlrm_jax.config import ModelConfig
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.tables.exchange import pooled_shapes

_ELEMENTWISE = ("mul", "square", "integer_pow")


@dataclasses.dataclass(frozen=True)
class DenseWork:
    """`parameters` and `averages`, those of batch norms, are floats; the others are of one example, going forward.

    `outputs` are the numbers that the layers of MLPs give, `interaction_width` those that the top MLP takes. `flops`
    are two for each multiplication, as an addition goes with it.
    """

    parameters: int
    flops: int
    outputs: int
    interaction_width: int
    averages: int = 0


@functools.lru_cache(maxsize=256)
def dense_work(model: ModelConfig) -> DenseWork:
    """The work of a model's MLPs and interaction. ConfigError where they do not fit together."""
    dense = jax.ShapeDtypeStruct((1, model.num_dense), "float32")
    pooled = pooled_shapes(model, 1)
    variables = jax.eval_shape(lambda *inputs: DLRM(model).init(jax.random.key(0), *inputs), dense, pooled)
    program = jax.make_jaxpr(DLRM(model).apply)(variables, dense, pooled)
    of_layers, averages = variables["params"], jax.tree.leaves(variables.get("batch_stats", {}))
    weights = {tuple(str(key.key) for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(of_layers)}
    return DenseWork(
        parameters=sum(math.prod(shape) for shape in weights.values()),
        flops=2 * _multiplications(program.jaxpr),
        outputs=sum(shape[-1] for path, shape in weights.items() if path[-1] == "kernel"),
        interaction_width=weights["top_mlp", "layer_0", "kernel"][0],
        averages=sum(math.prod(leaf.shape) for leaf in averages),
    )


def _multiplications(jaxpr: Any) -> int:
    """Of numbers, in products of matrices and one by one, in what is called too."""
    total = 0
    for equation in jaxpr.eqns:
        results = sum(math.prod(result.aval.shape) for result in equation.outvars)
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            total += results * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
        elif equation.primitive.name in _ELEMENTWISE:
            total += results
        called = sum(_multiplications(getattr(inner, "jaxpr", inner)) for inner in _called(equation.params))
        total += called * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def _called(params: Any) -> list[Any]:
    """The programs among an operation's parameters."""
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_program) if _is_program(leaf)]


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
