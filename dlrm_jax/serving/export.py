"""A trained state as a version of MODEL_DIR: its forward pass as StableHLO, weights, signature, vocabularies, metrics.

program.stablehlo     jax.export of (weights, dense_BxN, ids_BxK) -> probability_B, logit_B; any B
model.json            its configuration, for who places it on several devices (placed.py)
signature.json        what it takes (signature.py)
weights.json          name of each array of `weights` -> the files whose rows, one below the other, it is
weights/, tables/     .npy files; tables by name, as --tables stores them (quantise.py)
vocabularies/         keys of each table's values in the order of their ids (transform.py)
self_check.npz        a few rows and their probabilities, for who loads it to compare
metrics.json          of this very program on val and test
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from dlrm_jax import embedding, metrics, reporting
from dlrm_jax.batch import Batch
from dlrm_jax.config import ConfigError, LossConfig, ModelConfig, how_to_install, require_choice
from dlrm_jax.data.dataset import Dataset, Rows
from dlrm_jax.data.pipeline import Prefetcher, eval_batches
from dlrm_jax.data.prepared import is_prepared, read_json
from dlrm_jax.data.schema import Sparse
from dlrm_jax.data.schema_io import from_dict as schema_from_dict
from dlrm_jax.embedding import POOLING_WEIGHTS
from dlrm_jax.loss import example_losses, probability
from dlrm_jax.model import DLRM
from dlrm_jax.serving.quantise import TABLE_TYPES, stored_table, take_stored
from dlrm_jax.serving.signature import ServedFeature, Signature
from dlrm_jax.serving.store import Version, write_version

PLATFORMS = ("cpu", "cuda", "tpu")
_CHECKED_ROWS = 16

Weights = dict[str, Any]
Forward = Callable[[Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_forward(model: ModelConfig, loss: LossConfig, kind: str) -> Forward:
    """(weights, dense_BxN, ids_BxK) -> (probability_B, logit_B); weights by flat names."""
    take = take_stored(kind, model.embedding_dim)

    def forward(weights: Weights, dense_BxN: jax.Array, ids_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        pooled_BxFxD = embedding.lookup(model, weights, ids_BxK, take=take)
        logit_B = DLRM(model).apply({"params": nested(weights)}, dense_BxN, pooled_BxFxD)
        return probability(logit_B, loss.threshold), logit_B

    return forward


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
    named_tables: dict[str, np.ndarray],
    dataset: Dataset,
    kind: str = "float32",
    data_dir: pathlib.Path | None = None,
    facts: dict[str, Any] | None = None,
    evaluated: tuple[str, ...] = ("val", "test"),
) -> Version:
    """Write the next version. `named_tables` are float32, by table name (embedding.named_tables).

    `data_dir`, where the dataset was prepared, has its vocabularies. `evaluated` are the splits that metrics are of.
    """
    require_choice("tables", kind, TABLE_TYPES)
    signature = make_signature(model, dataset, kind, data_dir)
    stored = {}
    for name, rows in named_tables.items():
        try:
            stored[name] = rows if name.endswith(POOLING_WEIGHTS) else stored_table(rows, kind)
        except ConfigError as error:
            raise ConfigError(f"table {name!r}: {error}") from error
    dense = _flat(dense_params)
    weights = {name: jnp.asarray(value) for name, value in dense.items()} | embedding.stack_tables(model, stored)
    forward = make_forward(model, loss, kind)
    score = jax.jit(forward)
    scores = {name: _evaluate(score, weights, loss, dataset, name) for name in evaluated}

    def write(directory: pathlib.Path) -> None:
        shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
        program = export_program(forward, shapes, model.num_dense, model.num_slots)
        (directory / "program.stablehlo").write_bytes(program)
        described = {"model": dataclasses.asdict(model), "loss_threshold": loss.threshold}
        _write_json(directory / "model.json", described)
        _write_json(directory / "signature.json", signature.to_dict())
        _write_json(directory / "weights.json", _write_weights(directory, model, dense, stored))
        _write_json(directory / "metrics.json", reporting.json_ready(scores))
        if signature.schema is not None and data_dir is not None:
            _write_vocabularies(directory, signature, data_dir)
        _write_self_check(directory, score, weights, dataset.splits["train"], dataset)

    table_bytes = sum(rows.nbytes for rows in stored.values())
    facts = {"name": signature.name, "tables": kind, "table_bytes": table_bytes, **(facts or {})}
    return write_version(model_dir, write, facts | {"platforms": list(PLATFORMS), "versions": reporting.versions()})


def make_signature(model: ModelConfig, dataset: Dataset, kind: str, data_dir: pathlib.Path | None = None) -> Signature:
    """The inputs of a model on a dataset. Where bags are made of one-hot ids (--multi_hot), bags are what is served."""
    features = tuple(
        ServedFeature(f.name, f.table, f.hotness, f.pooling, model.table(f.table).num_embeddings)
        for f in model.features
    )
    raw = dataset.schema is not None and dataset.expander is None and data_dir is not None and is_prepared(data_dir)
    statistics = read_json(data_dir / "statistics.json").get("dense", {}) if raw and data_dir else None
    if raw and dataset.schema is not None and statistics is not None:
        for dense in schema_from_dict(dict(dataset.schema)).dense:
            if dense.needs_statistics and dense.name not in statistics:
                raise ConfigError(
                    f"{data_dir}/statistics.json lacks the statistics of dense column {dense.name!r}, which was "
                    "prepared by an older version; prepare the dataset anew"
                )
    return Signature(
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", dataset.name),
        dense_names=dataset.dense_names,
        features=features,
        embedding_dim=model.embedding_dim,
        kind=kind,
        schema=dict(dataset.schema) if raw and dataset.schema is not None else None,
        dense_statistics=statistics,
    )


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _file_name(index: int, name: str) -> str:
    return f"{index:03d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}.npy"


def _write_weights(
    directory: pathlib.Path, model: ModelConfig, dense: dict[str, np.ndarray], stored: dict[str, np.ndarray]
) -> dict[str, Any]:
    """weights.json, its files written."""
    for folder in ("weights", "tables"):
        (directory / folder).mkdir()
    arrays: dict[str, Any] = {}
    for i, (name, value) in enumerate(dense.items()):
        arrays[name] = {"dtype": value.dtype.name, "files": [_save(directory, f"weights/{_file_name(i, name)}", value)]}
    files = {}
    for i, (name, rows) in enumerate(stored.items()):
        files[name] = _save(directory, f"tables/{_file_name(i, name)}", rows)
    suffixes = ("", POOLING_WEIGHTS) if model.learned_pooling else ("",)
    for stack in embedding.make_stacks(model):
        for suffix in suffixes:
            names = [table.name + suffix for table in stack.tables]
            dtype = stored[names[0]].dtype.name
            arrays[stack.name + suffix] = {"dtype": dtype, "files": [files[name] for name in names], "tables": names}
    return arrays


def _save(directory: pathlib.Path, name: str, value: np.ndarray) -> str:
    # NumPy's format has no bfloat16; weights.json says what the bits are.
    np.save(directory / name, value.view(np.uint16) if value.dtype.name == "bfloat16" else value, allow_pickle=False)
    return name


def _write_vocabularies(directory: pathlib.Path, signature: Signature, data_dir: pathlib.Path) -> None:
    """Each vocabulary's keys in the order of ids, and a second hash of each where values are strings."""
    import pyarrow.parquet as pq

    from dlrm_jax.data.hashing import hash_strings

    (directory / "vocabularies").mkdir()
    index: dict[str, list[str]] = {}
    schema = schema_from_dict(dict(signature.schema or {}))
    for i, (table, features) in enumerate(schema.tables().items()):
        rule: Sparse = features[0]
        if rule.ids != "vocabulary":
            continue
        path = data_dir / "vocabularies" / f"{table}.parquet"
        try:
            values = pq.read_table(path, columns=["value"])["value"].combine_chunks()
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if rule.type == "string":
            columns = [hash_strings(values), hash_strings(values, seed=1)]
        else:
            columns = [values.to_numpy().view(np.uint64)]
        suffixes = (".keys.npy", ".checks.npy")
        names = [f"vocabularies/{_file_name(i, table)[:-4]}{suffix}" for suffix in suffixes[: len(columns)]]
        for name, column in zip(names, columns, strict=True):
            np.save(directory / name, column, allow_pickle=False)
        index[table] = names
    _write_json(directory / "vocabularies.json", index)


def _write_self_check(
    directory: pathlib.Path, forward: Forward, weights: Weights, split: Rows, dataset: Dataset
) -> None:
    rows, order = next(split.windows(seed=0, epoch=0, shuffle=False))
    order = order[:_CHECKED_ROWS]
    batch = Batch(rows.dense_RxN[order], rows.ids_RxK[order], rows.label_R[order], np.ones(len(order), np.float32))
    if dataset.expander is not None:
        batch = dataset.expander.on_host(batch)
    prob_B, logit_B = forward(weights, batch.dense_BxN, batch.ids_BxK)
    np.savez(
        directory / "self_check.npz",
        dense=np.asarray(batch.dense_BxN),
        ids=np.asarray(batch.ids_BxK),
        probability=np.asarray(prob_B),
        logit=np.asarray(logit_B),
    )


def _evaluate(
    forward: Forward, weights: Weights, loss: LossConfig, dataset: Dataset, name: str
) -> dict[str, Any] | None:
    """Metrics of the very program that is exported, so that what quantising costs shows."""
    split = dataset.splits[name]
    if not len(split):
        return None
    collected = metrics.Metrics()
    with Prefetcher(eval_batches(split, min(16384, len(split))), expander=dataset.expander) as batches:
        for _, batch in batches:
            prob_B, logit_B = forward(weights, batch.dense_BxN, batch.ids_BxK)
            collected.append(
                metrics.batch_sums(
                    loss_B=example_losses(loss, logit_B, batch.label_B),
                    logits_B=logit_B,
                    prob_B=prob_B,
                    label_B=batch.label_B,
                    weight_B=batch.weight_B,
                )
            )
    return collected.compute()
