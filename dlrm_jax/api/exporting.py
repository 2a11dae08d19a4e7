"""A run's checkpoint to a version of an exported model, whole or as what changed since another."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dlrm_jax.api.trained import Stored
from dlrm_jax.config import ModelConfig, require
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.host import files, memory
from dlrm_jax.host.native_code import compiler
from dlrm_jax.serving.artifact.export import MakeScore, by_engine, by_the_program, export_model, measuring_int8
from dlrm_jax.serving.artifact.export_delta import differing, export_delta
from dlrm_jax.serving.artifact.native import require_scored
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.quantise import stored_table
from dlrm_jax.serving.artifact.store import Version, open_version
from dlrm_jax.serving.artifact.written import floats_of, pieces_of, table_of
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.publish_options import require_spare_rows

NEWEST = "newest"
_LARGEST_BATCH = 16384
_REMEDY = "--tables=bfloat16, int8 or int4, or a machine or an accelerator with more memory"


def export(
    run: Stored,
    out: pathlib.Path,
    tables: str | None = None,
    evaluate: Sequence[str] = HELD_OUT,
    delta_from: str = "",
    spare_rows: float = 0.0,
    int8_layers: bool = False,
) -> Version:
    """Write the next version of the model in `out`, its rows stored as `tables` says, and score it on some splits.

    `delta_from` names a version there, by its number or as the newest, of which only what is other is written; its
    rows' type is then that of `tables`. Of a whole version each table gets that share of `spare_rows` more. With
    `int8_layers` the C++ scorer's are measured too; ConfigError where they move an AUC by more than 1e-4.
    """
    files.require_output_directory("out", out)
    parent = parent_of(out, delta_from, tables, spare_rows)
    if int8_layers:
        require_scored(run.model, "--int8_layers")
        compiler()
    table = max(run.model.tables, key=lambda table: table.num_embeddings)
    largest = f"table {table.name!r} ({table.num_embeddings:,} rows of {table.embedding_dim})"
    kind = (tables or "float32") if parent is None else parent.manifest["tables"]
    common: dict[str, Any] = {
        "dataset": run.dataset,
        "facts": {"step": run.step},
        "evaluated": tuple(evaluate),
        "batch_stats": run.batch_stats,
    }
    found = pieces_of(run.model, run.rows)
    with memory.named(largest, _REMEDY):
        make_score = _make_score(run.model, kind, largest, run.config.allow_oversubscription)
        common["make_score"] = measuring_int8(make_score) if int8_layers else make_score
        if parent is None:
            common |= {"kind": kind, "spare_rows": spare_rows}
            return export_model(out, run.model, run.config.loss, run.dense_params, found, **common)
        rows_of = differing(found, kind)
        return export_delta(out, parent, run.model, run.config.loss, run.dense_params, rows_of, **common)


def parent_of(out: pathlib.Path, delta_from: str, tables: str | None, spare_rows: float) -> Version | None:
    """The version of `out` that --delta_from names, if it does; ConfigError where the others do not go with it."""
    require_spare_rows(spare_rows)
    if not delta_from:
        return None
    require(
        delta_from == NEWEST or delta_from.isdecimal(),
        f"--delta_from={delta_from} is no version; give its number, or {NEWEST}",
    )
    require(not spare_rows, "--spare_rows is for a whole version, whose deltas use them; leave it or --delta_from out")
    parent = open_version(out, None if delta_from == NEWEST else int(delta_from))
    kind = parent.manifest["tables"]
    require(
        tables in (None, kind),
        f"--tables={tables}: version {parent.number} has tables of {kind}, and so has what changes it; leave "
        "--tables out, or --delta_from",
    )
    return parent


def rows_of(run: Stored, name: str, first: int, count: int) -> np.ndarray:
    """(count, columns) float32: rows of a table, or of its pooling weights, from the checkpoint, from `first` on."""
    table, kind, _ = table_of(run.model, name)
    return floats_of(table, kind, run.rows.rows(kind, table.name, first, 1, count))


def pieces(run: Stored, name: str) -> Iterator[np.ndarray]:
    """All rows of a table, or of its pooling weights, from the checkpoint, one piece below the other."""
    yield from pieces_of(run.model, run.rows)(name)


def _make_score(model: ModelConfig, tables: str, largest: str, oversubscribe: bool) -> MakeScore:
    """The exported program on one device; several where only they hold the tables.

    ConfigError where neither does: what is exported is evaluated, and scored for who loads it to compare.
    """
    row = stored_table(np.zeros((1, model.embedding_dim), np.float32), tables).nbytes
    needed = sum(table.num_embeddings for table in model.tables) * (row + 4 * model.learned_pooling)
    device = jax.devices()[0]
    on_host = device.platform == "cpu"
    free = memory.host_available() if on_host else memory.device_available(device)
    if not on_host and free is not None and needed > free and jax.device_count() > 1 and not oversubscribe:
        return by_engine(engine_maker(ShardingOptions(), _LARGEST_BATCH))
    where = "this machine's memory" if on_host else f"the memory of a {device.device_kind}"
    memory.require_room("evaluating what is exported", needed, free, where, largest, _REMEDY, oversubscribe)
    return by_the_program
