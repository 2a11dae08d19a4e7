"""A trained state as a version of MODEL_DIR: its forward pass as StableHLO, weights, signature, vocabularies, metrics.

program.stablehlo     jax.export of (weights, dense_BxN, ids_BxK) -> probability_B, logit_B; any B
model.json            its configuration, for who places it on several devices (placed.py)
signature.json        what it takes (signature.py)
weights.json          name of each array of `weights` -> the files whose rows, one below the other, it is
weights/, tables/     .npy files; tables by name, as --tables stores them (quantise.py)
vocabularies/         keys of each table's values in the order of their ids (transform.py)
self_check.npz        a few rows and their probabilities, for who loads it to compare
metrics.json          of this very program on val and test; manifest.json says so, or which devices it took instead,
                      and what int8 layers change of the AUC, where that was asked for (int8_layers.py)
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from dlrm_jax.data.read import pipeline
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.pipeline import Cut, steps_per_epoch
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.values.dense import DenseStatistics
from dlrm_jax.model import metrics
from dlrm_jax.serving.artifact import int8_layers
from dlrm_jax.serving.artifact.folded import folded
from dlrm_jax.serving.artifact.loaded import MakeEngine
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES, take_stored
from dlrm_jax.serving.artifact.raw_check import require_as_prepared
from dlrm_jax.serving.artifact.signature import ServedFeature, Signature
from dlrm_jax.serving.artifact.spare import padded, room_for, with_room
from dlrm_jax.serving.artifact.store import Version, write_version
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.serving.artifact.vocabularies import read_vocabularies
from dlrm_jax.serving.artifact.weights import read_weights
from dlrm_jax.serving.artifact.written import Pieces, flat, write_json, write_vocabularies, write_weights
from dlrm_jax.tables.exchange import local_ops
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


class Scorer(NamedTuple):
    """What scores batches as a version does, of a `multiple` of rows; `where` says what that is, in words.

    `checked` are the rows to note, where they are known already (checked_rows). `int8` is what scores by int8 layers,
    where what these change is to be measured (int8_layers.py).
    """

    score: Score
    multiple: int
    where: str
    checked: Batch | None = None
    int8: Score | None = None


MakeScore = Callable[[Version, ModelConfig, LossConfig, str], Scorer]
"""(a version whose files are written, but for what comes of this; its model, loss, type of its tables)."""
Forward = Callable[[Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_forward(model: ModelConfig, loss: LossConfig, kind: str) -> Forward:
    """(weights, dense_BxN, ids_BxK) -> (probability_B, logit_B); weights by flat names."""
    score = make_score(model, loss.threshold, local_ops(model, take=functools.partial(take_stored, kind)))
    return lambda weights, dense_BxN, ids_BxK: score(weights, nested(weights), dense_BxN, ids_BxK)


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


def by_the_program(version: Version, model: ModelConfig, loss: LossConfig, kind: str) -> Scorer:
    """What scores as the exported program does, on the first device."""
    weights, jitted = read_weights(version), _compiled_once(model, loss, kind)
    return Scorer(lambda dense, ids: jitted(weights, dense, ids), 1, "the exported program on one device")


@functools.lru_cache(maxsize=4)
def _compiled_once(model: ModelConfig, loss: LossConfig, kind: str) -> Any:
    return jax.jit(make_forward(model, loss, kind))


def measuring_int8(make_score: MakeScore) -> MakeScore:
    """The same beside int8 layers of the C++ scorer, which needs a CPU."""

    def make(version: Version, model: ModelConfig, loss: LossConfig, kind: str) -> Scorer:
        int8 = NativeCpu(version, int8=True)
        require(int8.num_coded > 0, f"{int8_layers.TOO_NARROW}; leave it out")
        return make_score(version, model, loss, kind)._replace(
            int8=lambda dense, ids: int8.run(np.asarray(dense), np.asarray(ids))
        )

    return make


def by_engine(make_engine: MakeEngine) -> MakeScore:
    """What scores as an engine does, on several devices, where one does not hold the tables."""

    def make(version: Version, model: ModelConfig, loss: LossConfig, kind: str) -> Scorer:
        del model, loss, kind
        engine = make_engine(version, None)
        where = f"{jax.device_count()} devices, which share the tables; not the exported program"
        score = lambda dense, ids: engine.run(np.asarray(dense), np.asarray(ids))  # noqa: E731
        return Scorer(score, engine.batch_multiple, where)

    return make


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
    make_score: MakeScore = by_the_program,
    batch_stats: Mapping[str, Any] | None = None,
    spare_rows: float = 0.0,
) -> Version:
    """Write the next version, its tables by `pieces`, so that no table need be in memory as a whole.

    `spare_rows` is the share of its rows that a table has to spare (spare.py).

    Batch norms, whose running averages are `batch_stats`, go into the products before them (folded.py).
    `evaluated` are the splits that metrics are of, by what `make_score` gives: the very program, on the first device.
    """
    require_choice("tables", kind, TABLE_TYPES)
    model, dense_params = folded(model, dense_params, batch_stats or {})
    signature = make_signature(model, dataset, kind)
    if spare := room_for(model, spare_rows):
        signature = dataclasses.replace(signature, spare=spare)
        pieces, model = padded(model, pieces, spare), with_room(model, spare)
    facts = stored_facts(signature, 0) | (facts or {})

    def write(directory: pathlib.Path) -> None:
        index, shapes, facts["table_bytes"] = write_weights(directory, model, flat(dense_params), pieces, kind)
        program = _program(model, loss, kind, tuple(shapes.items()))
        (directory / "program.stablehlo").write_bytes(program)
        write_json(directory / "model.json", described(model, loss))
        write_json(directory / "signature.json", to_dict(signature))
        write_json(directory / "weights.json", index)
        version = Version(0, directory, {})
        if signature.schema is not None and dataset.directory is not None:
            write_vocabularies(directory, signature, dataset.directory)
            words = read_vocabularies(version, signature)
            require_as_prepared(Reader(signature, words), signature, dataset)
        facts.update(write_scores(directory, make_score(version, model, loss, kind), loss, dataset, evaluated))

    return write_version(model_dir, write, facts)


@functools.lru_cache(maxsize=4)
def _program(model: ModelConfig, loss: LossConfig, kind: str, shapes: tuple[tuple[str, Any], ...]) -> bytes:
    """Made once for all versions of a model: it takes seconds."""
    return export_program(make_forward(model, loss, kind), dict(shapes), model.num_dense, model.num_slots)


def described(model: ModelConfig, loss: LossConfig) -> dict[str, Any]:
    """What model.json says, as JSON has it."""
    values: dict[str, Any] = json.loads(json.dumps({"model": to_dict(model), "loss_threshold": loss.threshold}))
    return values


def stored_facts(signature: Signature, table_bytes: int) -> dict[str, Any]:
    """What every manifest says beside its files."""
    facts = {"name": signature.name, "tables": signature.kind, "table_bytes": table_bytes}
    return facts | {"platforms": list(PLATFORMS), "versions": reporting.versions()}


def write_scores(
    directory: pathlib.Path, scorer: Scorer, loss: LossConfig, dataset: Dataset, evaluated: tuple[str, ...]
) -> dict[str, Any]:
    """Metrics on splits, and a few rows with their probabilities; what the manifest says of them."""
    scores = {name: _evaluate(scorer.score, scorer.multiple, loss, dataset, name) for name in evaluated}
    write_json(directory / "metrics.json", reporting.json_ready(scores))
    facts: dict[str, Any] = {"evaluated_on": scorer.where}
    checked = checked_rows(dataset) if scorer.checked is None else scorer.checked
    dense_BxN, ids_BxK, count = np.asarray(checked.dense_BxN), np.asarray(checked.ids_BxK), len(checked.label_B)
    more = ((0, -count % scorer.multiple), (0, 0))
    prob_B, logit_B = scorer.score(np.pad(dense_BxN, more), np.pad(ids_BxK, more, constant_values=EMPTY_SLOT))
    noted: dict[str, Any] = {"probability": np.asarray(prob_B)[:count], "logit": np.asarray(logit_B)[:count]}
    if scorer.int8 is not None:
        int8_scores = {name: _evaluate(scorer.int8, 1, loss, dataset, name) for name in evaluated}
        facts[int8_layers.MEASURED] = int8_layers.changes_of_auc(scores, int8_scores)
        noted[int8_layers.NOTED.name] = scorer.int8(dense_BxN, ids_BxK)[0]
    np.savez(directory / "self_check.npz", dense=dense_BxN, ids=ids_BxK, **noted)
    return facts


def checked_rows(dataset: Dataset) -> Batch:
    """The rows whose probabilities are noted with every version."""
    rows, order = next(dataset.splits["train"].windows(seed=0, epoch=0, shuffle=False))
    order = order[:_CHECKED_ROWS]
    ids = rows.ids_RxK[order]
    if dataset.expander is not None:
        ids = dataset.expander.on_host(ids)
    return Batch(rows.dense_RxN[order], ids, rows.label_R[order], np.ones(len(order), np.float32))


def of_arrays(named_tables: Mapping[str, np.ndarray]) -> Pieces:
    """Tables that are in memory, by name (by_name.named_tables)."""
    return lambda name: [named_tables[name]]


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
        longest=None if counted is None else _longest(counted),
    )


def _dense_statistics(statistics: dict[str, Any]) -> dict[str, DenseStatistics]:
    columns = statistics.get("dense", {}).items()
    return {name: from_dict(DenseStatistics, own, f"statistics.json: dense column {name!r}") for name, own in columns}


def _bucket_edges(statistics: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    tables = statistics["tables"].items()
    return {name: tuple(table["edges"]) for name, table in tables if "edges" in table}


def _longest(statistics: dict[str, Any]) -> dict[str, int]:
    tables = statistics["tables"].items()
    return {name: table["longest"] for name, table in tables if "longest" in table}


def _evaluate(score: Score, multiple: int, loss: LossConfig, dataset: Dataset, name: str) -> dict[str, Any] | None:
    """Metrics of what is exported, so that what quantising costs shows."""
    split = dataset.splits[name]
    if not len(split):
        return None

    def score_batch(batch: Batch) -> metrics.BatchSums:
        prob_B, logit_B = score(batch.dense_BxN, batch.ids_BxK)
        return metrics.scored_sums(loss, logit_B, prob_B, batch.label_B, batch.weight_B)

    rows = pipeline.padded(min(16384, len(split)), multiple)
    steps = steps_per_epoch(len(split), rows)
    return score_rows(Feed(split, Cut(rows, min(steps, 8)), expander=dataset.expander), score_batch).compute()
