"""The vocabularies of a version, and what reads raw rows by them."""

from collections.abc import Mapping, Sequence

import numpy as np

from dlrm_jax.config import require
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.values.vocabulary import Vocabulary
from dlrm_jax.serving.artifact.signature import Signature
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.weights import MORE, ArrayFile, ending

Columns = list[np.ndarray]
"""Keys, and where they are hashes of texts a second hash of each."""


def vocabulary_files(version: Version) -> dict[str, list[str]]:
    """The files of each table's vocabulary: keys, and where they are hashes a second one."""
    index = version.read_json("vocabularies.json") if version.has("vocabularies.json") else {}
    lists = isinstance(index, dict) and all(
        isinstance(files, list) and len(files) in (1, 2) and all(isinstance(file, str) for file in files)
        for files in index.values()
    )
    require(lists, f"{version.directory}/vocabularies.json names no files; export anew")
    return index


def read_vocabularies(version: Version, signature: Signature) -> dict[str, Vocabulary]:
    """The vocabulary of each table that has one."""
    rows = {feature.table: feature.rows for feature in signature.features}
    out, files_of = {}, vocabulary_files(version)
    for table, files in files_of.items():
        out[table] = Vocabulary(table, checked=len(files) == 2)
        out[table].extend(*read_columns(version, table, files))
        fits = len(out[table]) <= rows.get(table, -1)
        require(fits, f"{version.directory}: the vocabulary of table {table!r} does not fit its rows; export anew")
    require_fitting_schema(version, signature, files_of)
    return out


def read_columns(version: Version, table: str, files: Sequence[str]) -> Columns:
    """Of one table, with what deltas append."""
    parts = [_columns(version, table, files)]
    for delta in version.chain[1:]:
        parts += more_words(delta, {table: list(files)}).values()
    return parts[0] if len(parts) == 1 else [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _columns(version: Version, table: str, files: Sequence[str]) -> Columns:
    columns = [ArrayFile(version, file, "uint64").whole() for file in files]
    fits = {column.shape for column in columns} == {columns[0].shape[:1]}
    require(fits, f"{version.directory}: the vocabulary of table {table!r} does not fit its rows; export anew")
    return columns


def more_words(delta: Version, files_of: Mapping[str, list[str]]) -> dict[str, Columns]:
    """What a delta appends to the vocabularies whose files these are, by table."""
    return {
        table: _columns(delta, table, [ending(file, MORE) for file in files])
        for table, files in files_of.items()
        if delta.owns(ending(files[0], MORE))
    }


def require_fitting_schema(version: Version, signature: Signature, files_of: Mapping[str, list[str]]) -> None:
    """ConfigError where the rules of raw values make other inputs than the model takes."""
    if signature.schema is None:
        return
    schema = schema_from_dict(dict(signature.schema), f"{version.directory}/signature.json")
    ours = [(feature.name, feature.table, feature.hotness) for feature in signature.features]
    statistics = signature.dense_statistics or {}
    whole = ours == [(sparse.name, sparse.table_name, sparse.hotness) for sparse in schema.sparse]
    dense = tuple(dense.name for dense in schema.dense)
    whole &= signature.dense_names in (dense, dense or ("constant",))  # Without numbers there was a constant once.
    whole &= all(dense.name in statistics for dense in schema.dense if dense.needs_statistics)
    counted = [sparse for sparse in schema.sparse if sparse.ids == "vocabulary"]
    # Texts have a second hash, by which one that was never seen is told from one that was.
    whole &= all(len(files_of.get(s.table_name, ())) == 1 + (s.value_type == "string") for s in counted)
    edges, rows = signature.bucket_edges or {}, {feature.table: feature.rows for feature in signature.features}
    cut = {sparse.table_name for sparse in schema.sparse if sparse.is_quantile}
    whole &= all(table in edges and len(edges[table]) < rows[table] for table in cut)
    require(whole, f"{version.directory}: signature.json's schema is not of its inputs; export anew")
