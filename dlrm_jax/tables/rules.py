"""Table optimizers as the maths of a row: what each keeps, and how one gradient changes a row.

A rule sees M rows that a batch touched, each once, with the sum of its gradients (updates.py merges repeats, reads and
writes). Rows that no example looked up keep their weights and what is kept of them: moments do not decay meanwhile, as
in every sparse optimizer. Where a batch touches all rows, an update is the dense formula.

A rule's fields are its options: `--table_optimizer=NAME,field=value`. docs/ADDING.md says how to add one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dlrm_jax.config import require
from dlrm_jax.host.registry import Registry

Arrays = dict[str, jax.Array]

WEIGHT, ROW = "weight", "row"


@dataclasses.dataclass(frozen=True)
class Slot:
    """Numbers kept beside a table: one per weight or one per row, all `first` at the start.

    Of a slot that `adds` a step gives what is added to it, else its new value. None is ever below `least`.
    """

    name: str
    per: str = WEIGHT
    first: float = 0.0
    dtype: str = "float32"
    adds: bool = False
    least: float = -math.inf

    def width(self, columns: int) -> int:
        """Columns of the slot beside rows of `columns` weights."""
        return columns if self.per == WEIGHT else 1


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a step sees of M touched rows; `old` are their slots, (M, D) or (M, 1).

    `rate` is the learning rate, `count` the number of this update, from 1 on. `row_mean`, (M, D) to (M, 1), is the mean
    over a whole row, of which one device may have some columns only; `dim` is the whole row's width. `factor` is what
    the gradient was multiplied with already, and what is added to it has to be too.
    """

    grad_MxD: jax.Array
    weights_MxD: jax.Array
    old: Arrays
    rate: jax.Array
    count: jax.Array
    row_mean: Callable[[jax.Array], jax.Array]
    dim: int
    factor: jax.Array | float = 1.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """`step(rows) -> (what is added to the weights, new slots)`. Of a `linear` rule repeats need no merging."""

    linear: ClassVar[bool] = False
    sums: ClassVar[tuple[str, ...]] = ()
    """Slots that only ever grow, and may be made smaller at any time: rows are then moved as far as earlier on."""
    moves_by_slot: ClassVar[bool] = False
    """Whether weights are moved by a multiple of a new slot, which memory then holds once."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What is kept of a row."""
        return ()

    @property
    def counts_updates(self) -> bool:
        """Whether what is kept of a row is understood by the number of the run's updates."""
        return False

    @property
    def kind(self) -> type["Rule"]:
        """What must be the same for what one rule kept to be of use to another: not its options."""
        return type(self)

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """One update of M rows."""
        raise NotImplementedError

    def describe(self) -> str:
        """The rule in a word."""
        return type(self).__name__


def _require_below_one(rule: Rule, *names: str) -> None:
    for name in names:
        require(getattr(rule, name) < 1, f"table_optimizer's {name} is {getattr(rule, name)}; it must be below 1")


RULES: Registry[type[Rule]] = Registry(
    "table_optimizer",
    "dlrm_jax.table_optimizers",
    lambda rule: isinstance(rule, type) and issubclass(rule, Rule),
    "class of Rule",
)
register = RULES.register


@register("sgd")
@dataclasses.dataclass(frozen=True)
class Sgd(Rule):
    """w -= rate g."""

    linear: ClassVar[bool] = True

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """No slot."""
        return -row.rate * row.grad_MxD, {}


@register("momentum")
@dataclasses.dataclass(frozen=True)
class Momentum(Rule):
    """m = momentum m + g, w -= rate m: PyTorch's SGD with momentum."""

    momentum: float = 0.9
    moves_by_slot: ClassVar[bool] = True
    slots = (Slot("momentum"),)

    def __post_init__(self) -> None:
        _require_below_one(self, "momentum")

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """One number per weight."""
        momentum = self.momentum * row.old["momentum"] + row.grad_MxD
        return -row.rate * momentum, {"momentum": momentum}


@register("adagrad")
@dataclasses.dataclass(frozen=True)
class Adagrad(Rule):
    """s += g^2, w -= rate g / (sqrt(s) + eps): PyTorch's and the reference's."""

    eps: float = 1e-10
    sums: ClassVar[tuple[str, ...]] = ("sum",)
    slots = (Slot("sum", adds=True, least=0),)

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """One number per weight."""
        squares = jnp.square(row.grad_MxD)
        return -row.rate * row.grad_MxD / (jnp.sqrt(row.old["sum"] + squares) + self.eps), {"sum": squares}


@register("rowwise_adagrad")
@dataclasses.dataclass(frozen=True)
class RowwiseAdagrad(Rule):
    """s += mean over the row of g^2, w -= rate g / (sqrt(s) + eps).

    FBGEMM's EXACT_ROWWISE_ADAGRAD; the reference has it in optim/rwsadagrad.py.
    """

    eps: float = 1e-10
    sums: ClassVar[tuple[str, ...]] = ("sum",)
    slots = (Slot("sum", ROW, adds=True, least=0),)

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """One number per row."""
        squares = row.row_mean(jnp.square(row.grad_MxD))
        return -row.rate * row.grad_MxD / (jnp.sqrt(row.old["sum"] + squares) + self.eps), {"sum": squares}


@register("rmsprop")
@dataclasses.dataclass(frozen=True)
class RmsProp(Rule):
    """v = decay v + (1 - decay) g^2, w -= rate g / (sqrt(v) + eps): PyTorch's, not centred."""

    decay: float = 0.99
    eps: float = 1e-8
    slots = (Slot("square", least=0),)

    def __post_init__(self) -> None:
        _require_below_one(self, "decay")

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """One number per weight."""
        square = self.decay * row.old["square"] + (1 - self.decay) * jnp.square(row.grad_MxD)
        return -row.rate * row.grad_MxD / (jnp.sqrt(square) + self.eps), {"square": square}


@dataclasses.dataclass(frozen=True)
class _Adam(Rule):
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w -= rate m' / (sqrt(v') + eps) (arXiv:1412.6980, algorithm 1).

    m' = m / (1 - b1^t) and v' = v / (1 - b2^t). `correct_by=step` takes for t the number of the update, as FBGEMM does:
    a row first seen late starts with small steps of its moments' size. `correct_by=row` counts each row's own updates,
    one more number per row: every row starts as if the run had just begun.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    correct_by: str = "step"
    _square: ClassVar[str] = WEIGHT

    def __post_init__(self) -> None:
        _require_below_one(self, "b1", "b2")
        require(self.correct_by in ("step", "row"), f"correct_by is {self.correct_by!r}; choose step or row")

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The moments, and what counts a row's updates."""
        counted = (Slot("count", ROW, dtype="int32", adds=True, least=0),) if self.correct_by == "row" else ()
        return (Slot("mean"), Slot("square", self._square, least=0), *counted)

    @property
    def counts_updates(self) -> bool:
        """Whether moments are corrected for the number of the run's updates."""
        return self.correct_by == "step"

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """Both moments corrected for their start at 0."""
        squares = jnp.square(row.grad_MxD)
        squares = squares if self._square == WEIGHT else row.row_mean(squares)
        new = {
            "mean": self.b1 * row.old["mean"] + (1 - self.b1) * row.grad_MxD,
            "square": self.b2 * row.old["square"] + (1 - self.b2) * squares,
        }
        by_row = self.correct_by == "row"
        count = (row.old["count"] + 1 if by_row else jnp.asarray(row.count)).astype(jnp.float32)
        added = {"count": jnp.ones_like(row.old["count"])} if by_row else {}
        # 1 - b^t = -expm1(t log b): the difference itself would lose most of its digits for b near 1.
        mean = new["mean"] / -jnp.expm1(count * jnp.log(jnp.float32(self.b1)))
        square = new["square"] / -jnp.expm1(count * jnp.log(jnp.float32(self.b2)))
        return -row.rate * mean / (jnp.sqrt(square) + self.eps), new | added


@register("adam")
@dataclasses.dataclass(frozen=True)
class Adam(_Adam):
    """Adam on the rows that a batch touches; with --table_weight_decay, AdamW."""


@register("rowwise_adam")
@dataclasses.dataclass(frozen=True)
class RowwiseAdam(_Adam):
    """Adam whose second moment is one number per row, of the mean of g^2: FBGEMM's PARTIAL_ROWWISE_ADAM."""

    _square: ClassVar[str] = ROW


@register("ftrl")
@dataclasses.dataclass(frozen=True)
class Ftrl(Rule):
    """FTRL-proximal with per-weight rates (McMahan et al., KDD 2013, algorithm 1); alpha is the learning rate.

    n' = n + g^2, z' = z + g - (sqrt(n') - sqrt(n)) / alpha w, and w = 0 where |z'| <= l1, else
    -(z' - sign(z') l1) / ((beta + sqrt(n')) / alpha + l2). So a row's first update forgets its initial values but for
    their part in z, and with l1 a weight becomes exactly 0.
    """

    l1: float = 0.0
    l2: float = 0.0
    beta: float = 1.0
    initial: float = 0.0

    @property
    def slots(self) -> tuple[Slot, ...]:
        """z and n."""
        return (Slot("linear"), Slot("sum", first=self.initial, adds=True, least=0))

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """The weights that minimise what was seen so far."""
        squares = jnp.square(row.grad_MxD)
        root_old, root = jnp.sqrt(row.old["sum"]), jnp.sqrt(row.old["sum"] + squares)
        linear = row.old["linear"] + row.grad_MxD - (root - root_old) / row.rate * row.weights_MxD
        beyond = jnp.sign(linear) * jnp.maximum(jnp.abs(linear) - self.l1, 0)
        weights = -beyond / ((self.beta + root) / row.rate + self.l2)
        return weights - row.weights_MxD, {"linear": linear, "sum": squares}


@dataclasses.dataclass(frozen=True)
class Bounded(Rule):
    """A rule whose touched rows are also regularised, each once an update.

    `l2` is added to the gradient times the row; then `clip_value` bounds the gradient's numbers, `clip_norm` its norm;
    `weight_decay` takes
    rate times itself of the row away, apart from the gradient (arXiv:1711.05101); `max_norm` bounds the new row's norm.
    0 leaves each out.
    """

    rule: Rule
    l2: float = 0.0
    clip_value: float = 0.0
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    max_norm: float = 0.0

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Those of the rule."""
        return self.rule.slots

    @property
    def counts_updates(self) -> bool:
        """As the rule."""
        return self.rule.counts_updates

    @property
    def kind(self) -> type[Rule]:
        """The rule's."""
        return self.rule.kind

    def describe(self) -> str:
        """The rule, and that its rows are bounded."""
        return f"{self.rule.describe()} with bounded rows (--table_l2, --clip_value, --table_clip_norm and the like)"

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """The rule's, between what bounds its gradient and what bounds its row."""
        grad_MxD = row.grad_MxD
        if self.l2:
            grad_MxD = grad_MxD + row.factor * self.l2 * row.weights_MxD
        if self.clip_value:
            grad_MxD = jnp.clip(grad_MxD, -self.clip_value, self.clip_value)
        if self.clip_norm:
            grad_MxD = grad_MxD * _at_most(self.clip_norm, grad_MxD, row)
        added_MxD, new = self.rule.step(dataclasses.replace(row, grad_MxD=grad_MxD))
        if self.weight_decay:
            added_MxD = added_MxD - row.rate * self.weight_decay * row.weights_MxD
        if self.max_norm:
            after_MxD = row.weights_MxD + added_MxD
            added_MxD = after_MxD * _at_most(self.max_norm, after_MxD, row) - row.weights_MxD
        return added_MxD, new


def _at_most(norm: float, rows_MxD: jax.Array, row: Rows) -> jax.Array:
    """(M, 1): what each row is multiplied with so that its norm is at most `norm`; 1 where it is."""
    found = jnp.sqrt(row.row_mean(jnp.square(rows_MxD)) * row.dim)
    return jnp.where(found > norm, norm / jnp.maximum(found, 1e-30), 1)


def row_means(rule: Rule) -> int:
    """How often a step of the rule takes a mean over whole rows: what devices that share rows must agree on."""
    taken = []

    def row_mean(rows_MxD: jax.Array) -> jax.Array:
        taken.append(1)
        return jnp.mean(rows_MxD, axis=1, keepdims=True)

    def step() -> Any:
        old = {slot.name: jnp.zeros((1, slot.width(2)), slot.dtype) for slot in rule.slots}
        row = jnp.zeros((1, 2))
        return rule.step(Rows(row, row, old, jnp.float32(1), jnp.int32(1), row_mean, 2))

    jax.eval_shape(step)
    return len(taken)
