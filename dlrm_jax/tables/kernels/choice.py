"""Who looks up and updates a run's tables: XLA, or kernels of this folder, by name, platform and model.

`auto` takes what was measured as faster. On one CPU with a compiler that is C++ for tables that learn by Adagrad or
row-wise Adagrad, and for bags of LONG_BAGS ids or more on average (experiments/README.md); other models keep XLA's
bits. On GPUs it is Pallas for the update of rules that merge repeats (2.8 times as fast as XLA's on an
H200), while XLA's scatter for SGD, and its lookups, are near what their bytes take; the kernel is first held against
XLA's on a small table, on the GPU at hand. Elsewhere it is XLA.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dlrm_jax.config import ConfigError, ModelConfig, OptimizerConfig, require
from dlrm_jax.host import processes
from dlrm_jax.host.formulations import AUTO, NATIVE, PALLAS, XLA
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.dtypes import TableDtype, table_dtype
from dlrm_jax.tables.exchange import Fused, TableOps, placed_ops
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.kernels import build, native
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.tables.rules import Rule

LONG_BAGS = 4
_LOG = logging.getLogger("dlrm_jax")


class Kernels(NamedTuple):
    """Who looks up, and who updates."""

    lookup: str = XLA
    update: str = XLA

    def __str__(self) -> str:
        return self.update if self.lookup == self.update else f"{self.lookup} for lookups, {self.update} for updates"


ALL_XLA = Kernels()


def chosen(name: str, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> Kernels:
    """The kernels that `name` means here; those that do not work here are left to XLA, with a line in the log.

    Raises ConfigError for a name that the model, the devices or the machine cannot have, `auto` excepted.
    """
    platform = mesh.devices.flat[0].platform
    if name == NATIVE:
        require(mesh.size == 1, f"--kernels=native works on one device; this run has {mesh.size}: --mesh=model:1")
        require(platform == "cpu", f"--kernels=native is for CPUs; tables are on a {platform} here")
        require(not model.learned_pooling, "--kernels=native has no --learned_pooling; leave one of them out")
        build.register()
        return Kernels(*native.does(model, optimizer))
    if name == PALLAS:
        require(platform == "gpu", f"--kernels=pallas is for GPUs; tables are on a {platform} here")
        return _that_work(Kernels(PALLAS, PALLAS), model, optimizer)
    if name == AUTO and platform == "cpu" and mesh.size == 1:
        return _native_where_faster(model, optimizer)
    if name == AUTO and platform == "gpu" and any(not _adds(*kind) for kind in _kinds(model, optimizer)):
        return _that_work(Kernels(XLA, PALLAS), model, optimizer)
    return ALL_XLA


def table_ops(
    kernels: Kernels,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    stacks: tuple[Stack, ...],
    mesh: Mesh,
    options: ExchangeOptions,
) -> TableOps:
    """Route, lookup and update by these kernels."""
    fused = Fused()
    if PALLAS in kernels:  # Importing it takes a second.
        from dlrm_jax.tables.kernels.pooled import pool_bags
        from dlrm_jax.tables.kernels.segments import update_segments

        fused = Fused(
            (lambda stack, *args: pool_bags(stack.dtype, *args)) if kernels.lookup == PALLAS else None,
            update_segments if kernels.update == PALLAS else None,
        )
    plain = placed_ops(model, optimizer, stacks, mesh, options, fused)
    return native.with_native(plain, kernels.lookup == NATIVE, kernels.update == NATIVE, optimizer, stacks)


def _native_where_faster(model: ModelConfig, optimizer: OptimizerConfig) -> Kernels:
    kernels = Kernels(*native.does(model, optimizer, tell=False))
    merges = kernels.update == NATIVE and not all(_adds(*kind) for kind in _kinds(model, optimizer))
    long_bags = model.num_slots >= LONG_BAGS * len(model.features)
    if model.learned_pooling or kernels == ALL_XLA or not (merges or long_bags):
        return ALL_XLA
    try:
        build.register()
    except (ConfigError, OSError) as error:
        what = " and ".join(does for does, who in zip(("looks up", "updates"), kernels, strict=True) if who == NATIVE)
        _LOG.info("XLA %s tables, slower here than C++ would: %s", what, error)
        return ALL_XLA
    return kernels


def _kinds(model: ModelConfig, optimizer: OptimizerConfig) -> Iterator[tuple[Rule, TableDtype, int]]:
    """(rule, dtype, dim) of tables, each once."""
    kinds = {(table.optimizer, table.dtype, table.embedding_dim): None for table in model.tables}
    for described, dtype, dim in kinds:
        yield make_rule(optimizer, described), table_dtype(dtype), dim


def _adds(rule: Rule, dtype: TableDtype, dim: int) -> bool:
    """Whether an update adds to rows as gradients come, without merging repeats."""
    del dim
    return rule.linear and dtype.exact


def _that_work(kernels: Kernels, model: ModelConfig, optimizer: OptimizerConfig) -> Kernels:
    """`kernels` where they compile and give XLA's numbers on every process's GPU, else XLA's."""
    from dlrm_jax.tables.kernels import check

    for rule, dtype, dim in _kinds(model, optimizer):
        if kernels.lookup == PALLAS:
            problem = _problem(functools.partial(check.pool_case, dtype, dim), dtype)
            kernels = _left(kernels, "lookup", f"sums bags of {dim} {dtype.stored}", problem)
        if kernels.update == PALLAS:
            problem = _problem(functools.partial(check.update_case, rule, dtype, dim), dtype)
            kernels = _left(kernels, "update", f"updates rows of {dim} {dtype.stored} by {rule.describe()}", problem)
    return kernels


def _problem(case: Callable[[], Any], dtype: TableDtype) -> str:
    from dlrm_jax.tables.kernels import check

    try:
        return check.differs(case(), dtype)
    except Exception as error:  # Whatever a compiler does.
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _left(kernels: Kernels, part: str, what: str, problem: str) -> Kernels:
    if problem:
        _LOG.warning("XLA %s, as the Pallas kernel does not work here: %s", what, problem)
    return kernels._replace(**{part: XLA}) if processes.largest(int(bool(problem))) else kernels
