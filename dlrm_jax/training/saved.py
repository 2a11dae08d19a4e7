"""One saved checkpoint, read: nothing is handed out that was not compared with the checksums saved beside it.

Under the plan that it was saved under, Orbax reads each device's part of the tables. Under another one their rows lie
elsewhere, and Orbax reads arrays as a whole only: as NumPy arrays, or split evenly over devices, padded or cut at their
end (ArrayRestoreArgs). To move rows from there, a table would be in memory twice: as it was, and as it is to be. So
`_Open` takes the place of Orbax's handler of arrays, by its interface for those who store a type in their own way: it
opens what Orbax says is stored, and rows are read in windows, as each device needs them (tables/reshard.py).
"""

import contextlib
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore

from dlrm_jax.config import ConfigError
from dlrm_jax.tables.exchange import stack_rule
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.layout import place_stacks
from dlrm_jax.tables.plan import plan_from_dict
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.tables.reshard import Kind, Rows, Source, read_array
from dlrm_jax.tables.rules import ROW
from dlrm_jax.training import checksums
from dlrm_jax.training.checksums import array_name
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import TrainState

_LOG = logging.getLogger("dlrm_jax")

TABLES = ("tables", "table_opt_state")
"""The parts of a state that a plan places."""

CHUNK_BYTES = 2**24
"""What is read at least of a stored array: small beside a table, so that another plan can read it in pieces."""


class Saved:
    """The checkpoint in the directory `where`; what a damaged one raises is one ConfigError."""

    def __init__(self, where: pathlib.Path, restore: Callable[..., Any], instead: Callable[[], str]) -> None:
        """`restore` is Orbax's of this checkpoint, `instead` what to do without it."""
        self._where, self._orbax, self._instead = where, restore, instead

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The JSON record saved with it."""
        record = self._restore("record", ocp.args.JsonRestore())
        if self._noted is not None and self._noted.get("record") != checksums.of_json(record):
            raise self._cannot_read("the checksum of its record differs")
        return record

    @functools.cached_property
    def _noted(self) -> dict[str, Any] | None:
        """The checksums that were saved with it; None for one that was made before there were any."""
        described = self._where / "_CHECKPOINT_METADATA"
        if (self._where / "checksums").exists() or "checksums" in described.read_text("latin-1"):
            return self._restore("checksums", ocp.args.JsonRestore())
        return None

    def restore(self, placed: Placed) -> TrainState:
        """The state, placed as `placed` says, whatever it was placed as."""
        tables, rest = split(placed.abstract_state)
        how = self.record["placement"]
        if how.get("kernels", str(placed.chosen)) != str(placed.chosen):
            _LOG.info(
                "kernels of the tables were %s, and are %s here: what comes is equal up to rounding, not to the bit",
                how["kernels"],
                placed.chosen,
            )
        saved, by_slot = saved_stacks(placed, how), how.get("slots", False)
        if self._noted is None:
            _LOG.warning("checkpoint %s has no checksums, as those of older versions: it is not checked", self._where)
        dense = self._whole("dense", rest)
        if [stack.layout for stack in saved] == [stack.layout for stack in placed.stacks]:
            found = self._whole("tables", tables if by_slot else _without_slots(tables))
            found = found if by_slot else _with_slots(found, tables)
        else:
            with self._in_one_line():
                found = read_tables(self._rows(saved), placed, tables, by_slot)
        return complete(TrainState(**dense, **found), placed)

    def read_model(self, placed: Placed) -> tuple[dict[str, Any], Source]:
        """(a state but for its tables, by field, rows of its tables where they are stored): it fits any memory."""
        dense = self._whole("dense", split(placed.abstract_state)[1])
        return dense, self._rows(saved_stacks(placed, self.record["placement"]))

    def _whole(self, item: str, abstract: Any) -> Any:
        """The arrays of an item, placed as `abstract` says; ConfigError naming those that are not the ones noted."""
        tree = self._restore(item, ocp.args.StandardRestore(abstract))
        if self._noted is None:
            return tree
        try:
            different = checksums.differing(tree, self._noted[item])
        except Exception as error:  # The checksums themselves are damaged.
            raise self._cannot_read(f"its checksums are damaged: {error!r}") from error
        if different:
            names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            raise self._cannot_read(f"checksums differ in {names}")
        return tree

    def _rows(self, saved: tuple[Stack, ...]) -> Source:
        """Rows of the tables, which lie as `saved` says, checked as they are read."""
        handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, _Open()))
        with (
            self._in_one_line(),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as orbax,
        ):
            tree = orbax.restore(self._where / "tables")
        stores = {array_name(path): store for path, store in jax.tree_util.tree_leaves_with_path(tree)}

        def open_array(group: str, name: str) -> Any:
            path = f"{group}.{name}"
            noted = None if self._noted is None else self._noted["tables"][path]
            return _Sliced(stores[path], noted, path, self._in_one_line)

        return Source(saved, open_array)

    def _restore(self, item: str, args: Any) -> Any:
        with self._in_one_line():
            found = self._orbax(args=ocp.args.Composite(**{item: args})).get(item)
        if found is None:
            raise self._cannot_read(f"it has no {item}")
        return found

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # What a damaged file raises depends on where it is damaged.
            raise self._cannot_read(error) from error

    def _cannot_read(self, error: Exception | str) -> ConfigError:
        reason = " ".join(str(error).partition(" See full TensorStore details")[0].split())[:300] or repr(error)
        return ConfigError(f"cannot read checkpoint {self._where}: {reason}; {self._instead()}")


class _Open(ocp.type_handlers.ArrayHandler):
    """Gives arrays as they are stored, open and unread: TensorStores, of which rows can be sliced."""

    async def deserialize(
        self, infos: Sequence[ocp.type_handlers.ParamInfo], args: Sequence[ocp.type_handlers.RestoreArgs] | None = None
    ) -> Sequence[tensorstore.TensorStore]:
        """One for each of `infos`, with some of the pieces read last in memory, for all together."""
        del args
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 16 * CHUNK_BYTES}}, infos[0].ts_context)
        specs = [ocp.type_handlers.get_json_tspec_read(info, bool(info.is_ocdbt_checkpoint)) for info in infos]
        return [await tensorstore.open(spec, context=context, read=True, open=True) for spec in specs]


class _Sliced:
    """A stored array that is read by slicing it; what was `noted` of its pieces is compared first."""

    def __init__(
        self,
        store: tensorstore.TensorStore,
        noted: dict[str, Any] | None,
        path: str,
        in_one_line: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._store, self.shape, self._path, self._in_one_line = store, store.shape, path, in_one_line
        self._pieces = None if noted is None else checksums.StoredPieces(self._read, noted)

    def __getitem__(self, rows: slice) -> Any:
        with self._in_one_line():
            if self._pieces is not None and not self._pieces.whole(rows.start, rows.stop):
                raise ValueError(f"checksums differ in {self._path}")
            return self._read(rows)

    def _read(self, rows: slice) -> Any:
        return self._store[rows].read().result()


def read_tables(source: Rows, placed: Placed, tables: dict[str, Any], by_slot: bool) -> dict[str, Any]:
    """The placed parts of a state, from rows that lie elsewhere, as in a checkpoint made under another plan."""
    arrays = {stack.name + ending: (stack, bool(ending)) for stack in placed.stacks for ending in ("", POOLING_WEIGHTS)}

    def read(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        group, key, *inner = path
        stack, weights = arrays[key.key]
        stored = Kind(group.key, weights, weights, first=1.0 if weights else 0.0, dtype=str(leaf.dtype))
        if inner:
            slot = {slot.name: slot for slot in stack_rule(placed.optimizer, stack).slots}[inner[0].key]
            name = slot.name if by_slot else ""
            stored = Kind(group.key, weights, weights or slot.per == ROW, name, slot.first, slot.dtype)
        return read_array(source, stored, stack, leaf.shape, leaf.sharding)

    return jax.tree_util.tree_map_with_path(read, tables)


def complete(state: TrainState, placed: Placed) -> TrainState:
    """`state`, once it is seen to hold what `placed` asks for, array by array."""
    wanted, _ = jax.tree_util.tree_flatten_with_path(placed.abstract_state)
    for (path, want), leaf in zip(wanted, jax.tree.leaves(state), strict=True):
        if not isinstance(leaf, jax.Array) or (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
            found = f"{getattr(leaf, 'dtype', '?')}{list(getattr(leaf, 'shape', '?'))}"
            raise ConfigError(
                f"{array_name(path)} of a checkpoint was read as {type(leaf).__name__} {found}; the run needs an array "
                f"{want.dtype}{list(want.shape)}"
            )
    for stack in placed.stacks:
        for slot in stack_rule(placed.optimizer, stack).slots:
            for name in {stack.name, stack.name + POOLING_WEIGHTS} & set(state.table_opt_state):
                if not _in_range(state.table_opt_state[name][slot.name], slot.least):
                    raise ConfigError(
                        f"{TABLES[1]}.{name}.{slot.name} of a checkpoint holds NaN, infinity or a number below "
                        f"{slot.least}, which this optimizer never keeps"
                    )
    return state


@jax.jit
def _in_range(array: jax.Array, least: float) -> jax.Array:
    return (jnp.isfinite(array) & (array >= least)).all()


def _without_slots(tables: dict[str, Any]) -> dict[str, Any]:
    """Of what a plan places, the tree that the first checkpoints have: a table's only slot without its name."""
    states = {name: next(iter(slots.values()), ()) for name, slots in tables[TABLES[1]].items()}
    return tables | {TABLES[1]: states}


def _with_slots(found: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """The inverse."""
    states = {name: dict.fromkeys(slots, found[TABLES[1]][name]) for name, slots in tables[TABLES[1]].items()}
    return found | {TABLES[1]: states}


def split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a plan places, the rest), by field; what the run does without is left out."""
    left_out = {name for name in ("rate_factor", "batch_stats") if not jax.tree.leaves(getattr(state, name))}
    fields = {name: value for name, value in vars(state).items() if name not in left_out}
    return {name: fields.pop(name) for name in TABLES}, fields


def placement(placed: Placed) -> dict[str, Any]:
    """What must be known to read a checkpoint's tables, as JSON values."""
    how = {"plan": placed.plan.to_dict(), "packed": placed.packed, "divisible": True, "slots": True}
    return how | {"kernels": str(placed.chosen)}


def saved_stacks(placed: Placed, saved: dict[str, Any]) -> tuple[Stack, ...]:
    """How a checkpoint's tables are stored."""
    plan = plan_from_dict(saved["plan"], "the checkpoint's placement")
    return place_stacks(placed.model, plan, saved["packed"], divisible=saved.get("divisible", False))
