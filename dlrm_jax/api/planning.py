"""A run planned before it is made: where its tables lie, what a device holds and sends, how long a step should take."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from absl.flags import FlagValues

from dlrm_jax.cli.flags import config_from_flags, parsed
from dlrm_jax.config import ConfigError, ModelConfig
from dlrm_jax.host.mesh import parse_mesh
from dlrm_jax.planning import hardware as known_hardware
from dlrm_jax.planning import planner, report
from dlrm_jax.planning.calibrate import calibrate as measured
from dlrm_jax.planning.cost import Cost
from dlrm_jax.training import reporting
from dlrm_jax.training.opening import read
from dlrm_jax.training.options import choose_plan
from dlrm_jax.training.placement import load_of
from dlrm_jax.training.run_config import ALWAYS, RunConfig
from dlrm_jax.training.topology import Compiled, compile_report, parse_topology


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan and its costs: `str()` is the table for people, `to_dict` all of it as values.

    `ranked` are the strategies by their costs, `compiled` what XLA says of the step, where a topology was given.
    """

    setting: planner.Setting
    cost: Cost
    ranked: list[tuple[str, Cost]]
    compiled: Compiled | None = None

    def __str__(self) -> str:
        text = report.text(self.setting, self.cost, self.ranked)
        return text if self.compiled is None else f"{text}\n{self.compiled.text()}"

    def __repr__(self) -> str:
        return f"Plan(step_seconds={self.step_seconds:.3g}, bytes_held={self.bytes_held:.3g}, fits={self.fits})"

    @property
    def step_seconds(self) -> float:
        """How long a step should take."""
        return self.cost.step_seconds

    @property
    def bytes_held(self) -> float:
        """What a device holds at most."""
        return self.cost.bytes_held

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds that."""
        return self.setting.over(self.cost) <= 0

    def require_fitting(self) -> None:
        """ConfigError, with what would help, where it does not."""
        if not self.fits:
            raise ConfigError(planner.does_not_fit(self.setting, self.cost))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; `mesh` and `tables` are what the setting `sharding_plan` reads."""
        compiled = {} if self.compiled is None else {"compiled": self.compiled.to_dict()}
        found: dict[str, Any] = reporting.json_ready(report.as_dict(self.setting, self.cost, self.ranked) | compiled)
        return found

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as text, written to `path` if one is given: a file for `sharding_plan`."""
        if path is not None:
            reporting.write_json_atomically(pathlib.Path(path), self.to_dict())
        return json.dumps(self.to_dict(), indent=1)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw bytes and time of every strategy, as PNG, PDF or SVG."""
        report.draw(self.setting, self.ranked, pathlib.Path(path))


def plan(
    data: Any = None,
    *,
    devices: int = 0,
    hardware: str = "",
    topology: str = "",
    calibrate: bool = False,
    flagfile: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Plan:
    """Plan a run for `devices` of some `hardware` (h100, v5e...; by default the device at hand): nothing is allocated.

    `data` is a prepared dataset or its directory, `settings` are those of `train`. `topology`, as "v5p:4x4x4", plans
    for that TPU pod and compiles the real step for it; `calibrate` measures the device at hand first.

    >>> import dlrm_jax
    >>> plan = dlrm_jax.plan("data/clicks", devices=8, hardware="h100")
    >>> plan.fits, sorted(plan.to_dict()["tables"]), "predicted step" in str(plan)
    (True, ['user'], True)

    Raises ConfigError, in one line, for a setting that cannot be; a plan that does not fit says so (`fits`).
    """
    given = dict(settings) if data is None else settings | {"data_dir": os.fspath(data)}
    return plan_of(parsed(given, flagfile), devices, hardware, topology, calibrate)


def plan_of(
    values: FlagValues, devices: int = 0, hardware: str = "", topology: str = "", calibrate: bool = False
) -> Plan:
    """The plan of a run that a set of flags says."""
    config = config_from_flags(values, publishes=True)
    pod = parse_topology(topology) if topology else None
    chosen = sum(int(part.partition(":")[2] or 0) > 0 for part in config.sharding.mesh.split(",") if part)
    num_devices = pod.num_chips if pod else devices or (0 if chosen else 8)
    if num_devices < 0:
        raise ConfigError(f"--devices={num_devices} is not a number of devices")
    mesh = parse_mesh(config.sharding.mesh, num_devices or 2**31, "" if pod else "plan for --devices={0}")
    workdir = pathlib.Path(values["workdir"].value) if values["workdir"].value else None
    setting = planner.Setting(
        model=model_of(config, workdir),
        optimizer=config.optimizer,
        mesh=mesh,
        load=dataclasses.replace(load_of(config), resident_rows=resident_rows(config, workdir)),
        hardware=_hardware_of(hardware, pod.generation if pod else "", calibrate),
        group_size=config.sharding.group_size,
        packed=pod is not None,
    )
    ranked = planner.ranking(setting)
    chosen_plan = choose_plan(setting.model, config.sharding, mesh, dict(ranked)[planner.AUTO].plan)
    cost = setting.cost_of(chosen_plan)
    return Plan(setting, cost, ranked, compile_report(setting, config.loss, cost, pod) if pod else None)


def model_of(config: RunConfig, workdir: pathlib.Path | None = None) -> ModelConfig:
    """The model that the run would train, under the names that its data gives to tables."""
    if config.data.multi_hot != "none":  # Both ways give bags of the same sizes, and this one holds nothing in memory.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, multi_hot="virtual"))
    return read(config, workdir)[1]


def resident_rows(config: RunConfig, workdir: pathlib.Path | None = None) -> int:
    """Rows of train and val that are to stay on every device; where that is left open, none are planned for."""
    if config.data_on_device != ALWAYS:
        return 0
    splits = read(config, workdir)[0].splits
    return len(splits["train"]) + len(splits["val"])


def _hardware_of(name: str, generation: str, calibrate: bool) -> known_hardware.Hardware:
    """The hardware to plan for."""
    if calibrate:
        return measured()
    if generation or name:
        return known_hardware.find(generation or name)
    import jax  # Only now is a device touched.

    return known_hardware.of_device(jax.devices()[0], jax.local_device_count())
