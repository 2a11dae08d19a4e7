"""A trained state as a version of MODEL_DIR: its forward pass as StableHLO, weights, signature, vocabularies, metrics.

program.stablehlo     jax.export of (weights, dense_BxN, ids_BxK) -> probability_B, logit_B; any B
model.json            its configuration, for who places it on several devices (placed.py)
signature.json        what it takes (signature.py)
weights.json          name of each array of `weights` -> the files whose rows, one below the other, it is
weights/, tables/     .npy files; tables by name, as --tables stores them (quantise.py)
vocabularies/         keys of each table's values in the order of their ids (transform.py)
self_check.npz        a few rows and their probabilities, for who loads it to compare
metrics.json          of this very program on val and test; manifest.json says so, or which devices it took instead
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from dlrm_jax.config import (
    EMPTY_SLOT,
    ConfigError,
    LossConfig,
    ModelConfig,
    from_dict,
    how_to_install,
    require,
    require_choice,
    to_dict,
)
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.dataset import Dataset, Rows
from dlrm_jax.data.read.pipeline import Cut, padded, steps_per_epoch
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.data.read.raw_values import read_vocabulary
from dlrm_jax.data.schema.schema import HELD_OUT, Sparse
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.values.dense import DenseStatistics
from dlrm_jax.model import metrics
from dlrm_jax.serving.artifact.folded import folded
from dlrm_jax.serving.artifact.loaded import MakeEngine, read_reader
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES, stored_table, take_stored
from dlrm_jax.serving.artifact.raw_check import require_as_prepared
from dlrm_jax.serving.artifact.signature import ServedFeature, Signature
from dlrm_jax.serving.artifact.store import Version, write_version
from dlrm_jax.serving.artifact.weights import read_weights
from dlrm_jax.tables.exchange import local_ops
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training import reporting
from dlrm_jax.training.evaluation import score_rows
from dlrm_jax.training.feed import Feed
from dlrm_jax.training.step import make_score

PLATFORMS = ("cpu", "cuda", "tpu")
_CHECKED_ROWS = 16

Weights = dict[str, Any]
Score = Callable[[Any, Any], Any]
"""(dense_BxN, ids_BxK) -> (probability_B, logit_B)."""
Pieces = Callable[[str], Iterable[np.ndarray]]
"""The float32 rows of a table, or (`<table>/pooling_weights`) of its pooling weights, one piece below the other."""
Forward = Callable[[Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_forward(model: ModelConfig, loss: LossConfig, kind: str) -> Forward:
    """(weights, dense_BxN, ids_BxK) -> (probability_B, logit_B); weights by flat names."""
    score = make_score(model, loss.threshold, local_ops(model, take=functools.partial(take_stored, kind)))
    return lambda weights, dense_BxN, ids_BxK: score(weights, nested(weights), dense_BxN, ids_BxK)


def _flat(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    out = {}
    for name, value in tree.items():
        inner = f"{path}{name}"
        out.update(_flat(value, f"{inner}/") if isinstance(value, dict) else {inner: np.asarray(value)})
    return out


def nested(weights: Weights) -> dict[str, Any]:
    """The dense parameters among weights by flat names, as Flax has them."""
    tree: dict[str, Any] = {}
    for name, value in weights.items():
        *parents, leaf = name.split("/")
        if not parents or name.endswith(POOLING_WEIGHTS):
            continue
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return tree


def export_program(forward: Forward, weights: dict[str, jax.ShapeDtypeStruct], num_dense: int, num_slots: int) -> bytes:
    """`forward` as serialized StableHLO with a symbolic batch size."""
    (batch,) = jax_export.symbolic_shape("b")
    dense = jax.ShapeDtypeStruct((batch, num_dense), jnp.float32)
    ids = jax.ShapeDtypeStruct((batch, num_slots), jnp.int32)
    exported = jax_export.export(jax.jit(forward), platforms=PLATFORMS)(weights, dense, ids)
    try:
        return bytes(exported.serialize())
    except ImportError:
        raise ConfigError(f"serialising StableHLO needs flatbuffers: {how_to_install('serve')}") from None


def export_model(
    model_dir: pathlib.Path,
    model: ModelConfig,
    loss: LossConfig,
    dense_params: Any,
    pieces: Pieces,
    dataset: Dataset,
    kind: str = "float32",
    facts: dict[str, Any] | None = None,
    evaluated: tuple[str, ...] = HELD_OUT,
    make_engine: MakeEngine | None = None,
    batch_stats: Mapping[str, Any] | None = None,
) -> Version:
    """Write the next version, its tables by `pieces`, so that no table need be in memory as a whole.

    Batch norms, whose running averages are `batch_stats`, go into the products before them (folded.py).
    `evaluated` are the splits that metrics are of.
    What is written is scored by the very program, on the first device; by `make_engine` where it does not fit there.
    """
    require_choice("tables", kind, TABLE_TYPES)
    model, dense_params = folded(model, dense_params, batch_stats or {})
    signature = make_signature(model, dataset, kind)
    dense, forward = _flat(dense_params), make_forward(model, loss, kind)
    facts = {"name": signature.name, "tables": kind, "table_bytes": 0, **(facts or {})}

    def write(directory: pathlib.Path) -> None:
        index, shapes, facts["table_bytes"] = _write_weights(directory, model, dense, pieces, kind)
        program = export_program(forward, shapes, model.num_dense, model.num_slots)
        (directory / "program.stablehlo").write_bytes(program)
        described = {"model": to_dict(model), "loss_threshold": loss.threshold}
        _write_json(directory / "model.json", described)
        _write_json(directory / "signature.json", to_dict(signature))
        _write_json(directory / "weights.json", index)
        if signature.schema is not None and dataset.directory is not None:
            _write_vocabularies(directory, signature, dataset.directory)
            require_as_prepared(read_reader(Version(0, directory, {}), signature), signature, dataset)
        score, multiple, facts["evaluated_on"] = _scorer(Version(0, directory, {}), forward, make_engine)
        scores = {name: _evaluate(score, multiple, loss, dataset, name) for name in evaluated}
        _write_json(directory / "metrics.json", reporting.json_ready(scores))
        _write_self_check(directory, score, multiple, dataset.splits["train"], dataset)

    facts |= {"platforms": list(PLATFORMS), "versions": reporting.versions()}
    return write_version(model_dir, write, facts)


def of_arrays(named_tables: Mapping[str, np.ndarray]) -> Pieces:
    """Tables that are in memory, by name (by_name.named_tables)."""
    return lambda name: [named_tables[name]]


def _scorer(version: Version, forward: Forward, make_engine: MakeEngine | None) -> tuple[Score, int, str]:
    """(what scores a batch by the files of a version, what batches must be a multiple of, in words)."""
    if make_engine is not None:
        engine = make_engine(version, None)
        where = f"{jax.device_count()} devices, which share the tables; not the exported program"
        return lambda dense, ids: engine.run(np.asarray(dense), np.asarray(ids)), engine.batch_multiple, where
    weights, jitted = read_weights(version), jax.jit(forward)
    return lambda dense, ids: jitted(weights, dense, ids), 1, "the exported program on one device"


def make_signature(model: ModelConfig, dataset: Dataset, kind: str) -> Signature:
    """The inputs of a model on a dataset. Where bags are made of one-hot ids (--multi_hot), bags are what is served."""
    features = tuple(ServedFeature(f.name, f.table, f.hotness, f.pooling, model.num_ids(f)) for f in model.features)
    schema = counted = None
    if dataset.directory is not None and dataset.expander is None:  # Bags made of one-hot ids are of no column.
        schema = dict(dataset.schema or {})
        counted = read_json(dataset.directory / "statistics.json")
        for dense in schema_from_dict(schema).dense:
            require(
                not dense.needs_statistics or dense.name in counted.get("dense", {}),
                f"{dataset.directory}/statistics.json lacks the statistics of dense column {dense.name!r}, which was "
                "prepared by an older version; prepare the dataset anew",
            )
    return Signature(
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", dataset.name),
        dense_names=dataset.dense_names,
        features=features,
        embedding_dim=model.embedding_dim,
        kind=kind,
        schema=schema,
        dense_statistics=None if counted is None else _dense_statistics(counted),
        bucket_edges=None if counted is None else _bucket_edges(counted),
    )


def _dense_statistics(statistics: dict[str, Any]) -> dict[str, DenseStatistics]:
    columns = statistics.get("dense", {}).items()
    return {name: from_dict(DenseStatistics, own, f"statistics.json: dense column {name!r}") for name, own in columns}


def _bucket_edges(statistics: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    tables = statistics["tables"].items()
    return {name: tuple(table["edges"]) for name, table in tables if "edges" in table}


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _file_name(index: int, name: str) -> str:
    return f"{index:03d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}.npy"


def _write_weights(
    directory: pathlib.Path, model: ModelConfig, dense: dict[str, np.ndarray], pieces: Pieces, kind: str
) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct], int]:
    """(weights.json, the arrays' shapes, bytes of the tables), the files written."""
    for folder in ("weights", "tables"):
        (directory / folder).mkdir()
    arrays: dict[str, Any] = {}
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in dense.items()}
    for i, (name, value) in enumerate(dense.items()):
        file = f"weights/{_file_name(i, name)}"
        _append(directory / file, [value], value.shape)
        arrays[name] = {"dtype": value.dtype.name, "files": [file]}
    suffixes = ("", POOLING_WEIGHTS) if model.learned_pooling else ("",)
    names = [table.name + suffix for table in model.tables for suffix in suffixes]
    written = {}
    for i, name in enumerate(names):
        table = model.table(name.removesuffix(POOLING_WEIGHTS))
        stored_as = "float32" if name.endswith(POOLING_WEIGHTS) else kind
        file = f"tables/{_file_name(i, name)}"
        row = _append(directory / file, _stored(name, pieces(name), stored_as), (table.num_embeddings,))
        written[name] = (file, row)
    table_bytes = 0
    for stack in local_stacks(model, divisible=False):
        for suffix in suffixes:
            of_stack = [table.name + suffix for table in stack.tables]
            files, (row, *_) = zip(*(written[name] for name in of_stack), strict=True)
            arrays[stack.name + suffix] = {"dtype": row.dtype.name, "files": list(files), "tables": of_stack}
            shapes[stack.name + suffix] = jax.ShapeDtypeStruct((stack.rows, *row.shape), row.dtype)
            table_bytes += stack.rows * row.size * row.dtype.itemsize
    return arrays, shapes, table_bytes


def _stored(name: str, pieces: Iterable[np.ndarray], kind: str) -> Iterator[np.ndarray]:
    """A table's rows as they are stored; ConfigError for what is not finite."""
    first = 0
    for rows_PxD in pieces:
        bad = np.flatnonzero(~np.isfinite(rows_PxD).all(axis=1))
        if len(bad):
            raise ConfigError(
                f"table {name!r} holds NaN or infinity, first in row {first + bad[0]}; export another --checkpoint"
            )
        yield stored_table(np.asarray(rows_PxD, np.float32), kind)
        first += len(rows_PxD)


def _append(path: pathlib.Path, pieces: Iterable[np.ndarray], rows: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Write a .npy file of arrays one below the other, `rows` in all, as numpy.save would; a row's shape and type."""
    row = None
    with path.open("wb") as file:
        for piece in pieces:
            # NumPy's format has no bfloat16; weights.json says what the bits are.
            bits = piece.view(np.uint16) if piece.dtype.name == "bfloat16" else piece
            if row is None:
                row = jax.ShapeDtypeStruct(piece.shape[1:], piece.dtype)
                shape = (*rows[:1], *piece.shape[1:])
                described = {"descr": np.lib.format.dtype_to_descr(bits.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, described)
            np.ascontiguousarray(bits).tofile(file)
    assert row is not None, "a table has rows"
    return row


def vocabulary_keys(signature: Signature, data_dir: pathlib.Path) -> Iterator[tuple[int, str, list[np.ndarray]]]:
    """(a table's place, its name, its vocabulary's keys in the order of ids, and of texts a second hash of each)."""
    from dlrm_jax.data.values.hashing import hash_strings

    schema = schema_from_dict(dict(signature.schema or {}))
    for i, (table, features) in enumerate(schema.tables().items()):
        rule: Sparse = features[0]
        if rule.ids != "vocabulary":
            continue
        values = read_vocabulary(data_dir, schema, table)
        if rule.value_type == "string":
            yield i, table, [hash_strings(values), hash_strings(values, seed=1)]
        else:
            yield i, table, [values.to_numpy().view(np.uint64)]


def _write_vocabularies(directory: pathlib.Path, signature: Signature, data_dir: pathlib.Path) -> None:
    """Each vocabulary's keys, and where values are texts a second hash of each."""
    (directory / "vocabularies").mkdir()
    index: dict[str, list[str]] = {}
    for i, table, columns in vocabulary_keys(signature, data_dir):
        suffixes = (".keys.npy", ".checks.npy")
        names = [f"vocabularies/{_file_name(i, table)[:-4]}{suffix}" for suffix in suffixes[: len(columns)]]
        for name, column in zip(names, columns, strict=True):
            np.save(directory / name, column, allow_pickle=False)
        index[table] = names
    _write_json(directory / "vocabularies.json", index)


def _write_self_check(directory: pathlib.Path, score: Score, multiple: int, split: Rows, dataset: Dataset) -> None:
    rows, order = next(split.windows(seed=0, epoch=0, shuffle=False))
    order = order[:_CHECKED_ROWS]
    ids = rows.ids_RxK[order]
    if dataset.expander is not None:
        ids = dataset.expander.on_host(ids)
    batch = Batch(rows.dense_RxN[order], ids, rows.label_R[order], np.ones(len(order), np.float32))
    dense_BxN, ids_BxK, count = np.asarray(batch.dense_BxN), np.asarray(batch.ids_BxK), len(order)
    more = ((0, -count % multiple), (0, 0))
    prob_B, logit_B = score(np.pad(dense_BxN, more), np.pad(ids_BxK, more, constant_values=EMPTY_SLOT))
    np.savez(
        directory / "self_check.npz",
        dense=dense_BxN,
        ids=ids_BxK,
        probability=np.asarray(prob_B)[:count],
        logit=np.asarray(logit_B)[:count],
    )


def _evaluate(score: Score, multiple: int, loss: LossConfig, dataset: Dataset, name: str) -> dict[str, Any] | None:
    """Metrics of what is exported, so that what quantising costs shows."""
    split = dataset.splits[name]
    if not len(split):
        return None

    def score_batch(batch: Batch) -> metrics.BatchSums:
        prob_B, logit_B = score(batch.dense_BxN, batch.ids_BxK)
        return metrics.scored_sums(loss, logit_B, prob_B, batch.label_B, batch.weight_B)

    rows = padded(min(16384, len(split)), multiple)
    steps = steps_per_epoch(len(split), rows)
    return score_rows(Feed(split, Cut(rows, min(steps, 8)), expander=dataset.expander), score_batch).compute()
