"""What a user may say of placement, and the Placed that comes of it for a model, its data and the devices at hand."""

import dataclasses
import pathlib
from collections.abc import Iterable

import jax
import numpy as np

from dlrm_jax.config import ConfigError, ModelConfig, OptimizerConfig, check_settings, setting, settings
from dlrm_jax.data.batch import Batch
from dlrm_jax.host.formulations import XLA
from dlrm_jax.host.mesh import MeshShape, make_mesh, parse_mesh
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.forms import FORMS, form_of
from dlrm_jax.tables.forms.base import GROUP, Stack
from dlrm_jax.tables.layout import place_stacks
from dlrm_jax.tables.plan import DATA_PARALLEL, Plan, make_plan, read_overrides
from dlrm_jax.training.placed import Placed

AUTO = "auto"
EXCHANGE_DTYPES = ("float32", "bfloat16")

_HEADROOM = 1.1
"""Room in the exchange's buffers beyond what the sampled batches need."""


@dataclasses.dataclass(frozen=True)
class ShardingOptions:
    """Flags of placement. Empty and 0: all devices on `model`, groups of half of them, buffers by a sample of the data.

    `plan` is a file of overrides (plan.read_overrides), `pipeline` the two-stage loop (step.make_pipelined_step).
    """

    sharding: str = setting(
        AUTO,
        "Where tables lie on several devices: a copy each, whole tables, rows, columns, rows within groups of devices; "
        "auto plans each table by its cost (dlrm_jax.plan shows it).",
        choices=lambda: (*FORMS.all(), AUTO),
    )
    plan: str = setting(
        "",
        "JSON file that places single tables otherwise; what dlrm_jax.plan --json writes.",
        flag="sharding_plan",
    )
    mesh: str = setting(
        "", "Devices, as data:2,model:4: tables are split over model, copied over data. Default: all on model."
    )
    group_size: int = setting(0, "Devices of a group of table_row_wise; 0: half of the model axis.", at_least=0)
    exchange_dtype: str = setting("float32", "How vectors travel between devices.", choices=EXCHANGE_DTYPES)
    exchange_capacity: int = setting(
        0,
        "Rows that a device asks of each peer at once (row_wise, table_row_wise); more take further rounds. "
        "0: what the first batches need.",
        at_least=0,
    )
    pipeline: bool = setting(
        False,
        "Exchange the next batch's ids during this batch's compute; equal results.",
        flag="pipeline_exchange",
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def travelling_dtype(self) -> str:
        """As exchange.ExchangeOptions has it."""
        return "" if self.exchange_dtype == "float32" else self.exchange_dtype


def choose_plan(model: ModelConfig, options: ShardingOptions, mesh: MeshShape, auto: Plan | None) -> Plan:
    """The plan of `options`; `auto` is what sharding=auto gives."""
    overrides = dict(read_overrides(_existing(options.plan))) if options.plan else {}
    if options.sharding == AUTO:
        assert auto is not None
        overrides = {**auto.tables, **overrides}
    fallback = DATA_PARALLEL if options.sharding == AUTO else options.sharding
    return make_plan(model, mesh, fallback, overrides, options.group_size)


def check_on_one_device(model: ModelConfig, options: ShardingOptions) -> list[str]:
    """The placement flags that one device leaves without effect; ConfigError for a plan that cannot be its own."""
    choose_plan(model, ShardingOptions(DATA_PARALLEL, options.plan), MeshShape(1, 1), None)
    return _given(options, [field.name for field in dataclasses.fields(options) if field.name != "mesh"])


def without_effect(options: ShardingOptions, plan: Plan) -> list[str]:
    """The placement flags that a plan leaves without effect."""
    forms = [form_of(placement.sharding) for placement in plan.tables.values()]
    unused = [] if any(form.span == GROUP for form in forms) else ["group_size"]
    unused += [] if any(form.in_rounds for form in forms) else ["exchange_capacity"]
    unused += ["exchange_dtype"] if all(form.replicated for form in forms) else []
    return _given(options, unused)


def _given(options: ShardingOptions, fields: list[str]) -> list[str]:
    """Those of some fields that are not their default, as flags."""
    known = {path[0]: known for path, known in settings(ShardingOptions)}
    values = {name: getattr(options, name) for name in fields}
    return [
        f"--{known[name].flag}={str(value).lower() if value is True else value}"
        for name, value in values.items()
        if value != known[name].default
    ]


def _existing(path: str) -> pathlib.Path:
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--sharding_plan: {path} is not a file; dlrm_jax.plan --json writes one")
    return pathlib.Path(path)


def place(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    options: ShardingOptions,
    auto: Plan | None = None,
    sample: Iterable[Batch] = (),
    devices: list | None = None,
    kernels: str = XLA,
) -> Placed:
    """The model on all devices (or `devices`). `sample`, global batches on the host, sizes the exchange's buffers."""
    devices = jax.devices() if devices is None else devices
    shape = parse_mesh(options.mesh, len(devices))
    plan = choose_plan(model, options, shape, auto)
    stacks = place_stacks(model, plan)
    capacity = exchange_capacity(stacks, shape.size, sample, options.exchange_capacity)
    exchange = ExchangeOptions(options.travelling_dtype, capacity)
    return Placed(model, optimizer, plan, make_mesh(shape, devices), exchange, kernels=kernels)


def exchange_capacity(
    stacks: tuple[Stack, ...], num_devices: int, sample: Iterable[Batch], fixed: int = 0
) -> dict[str, int]:
    """Rows that a device may ask of each peer at once, for stacks that ask for rows: `fixed` or by `sample`."""
    routed = [stack for stack in stacks if stack.form.in_rounds and stack.num_shards > 1]
    if fixed:
        return {stack.name: fixed for stack in routed}
    most: dict[str, int] = {}
    for batch in sample if routed else ():
        for part in np.array_split(np.asarray(batch.ids_BxK), num_devices):
            for stack in routed:
                most[stack.name] = max(most.get(stack.name, 1), asked_at_most(stack, part))
    return {name: -(-int(count * _HEADROOM + 1) // 8) * 8 for name, count in most.items()}


def asked_at_most(stack: Stack, ids_bxK: np.ndarray) -> int:
    """The most distinct rows that these examples need of one shard."""
    counts = np.zeros(stack.num_shards, np.int64)
    rows_bxk = stack.row_numbers(ids_bxK)
    for table in range(len(stack.tables)):
        distinct = np.unique(rows_bxk[:, stack.table_K == table])
        owners = stack.first_T[table] + distinct[distinct >= 0] % stack.count_T[table]
        counts += np.bincount(owners, minlength=stack.num_shards)
    return int(counts.max())
