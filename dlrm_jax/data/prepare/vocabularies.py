"""The values of a table in the order of its ids: read from what was staged, written beside the shards, as words."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.data.prepare.staging import Staging, writing
from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.host.files import whole


def vocabulary_values(staging: Staging, num_files: int, table: int, rule: Sparse) -> pa.Array:
    """The values of a vocabulary, in the order of provisional ids."""
    parts = []
    for file in range(num_files):
        for addition in staging.additions(file, table):
            parts.append(addition.texts if addition.texts is not None else pa.array(addition.keys))
    if rule.value_type == "string":
        return pa.concat_arrays(parts) if parts else pa.array([], pa.large_string())
    keys = np.concatenate([part.to_numpy() for part in parts]) if parts else np.zeros(0, np.uint64)
    kinds = {"hex": np.uint64, "int": np.int64, "number": np.float64}
    return pa.array(keys.view(kinds[rule.value_type]))


def write_vocabulary(path: pathlib.Path, values: pa.Array, counts: np.ndarray, first: int) -> None:
    """A Parquet file of ids, from `first` on, their values, and how often each occurs."""
    path.parent.mkdir(exist_ok=True)
    ids = pa.array(np.arange(first, first + len(values), dtype=np.int32))
    table = pa.table({"id": ids, "value": values, "count": pa.array(counts[: len(values)])})
    with writing(path), whole(path) as temporary:
        pq.write_table(table, temporary, use_dictionary=False)


def describe_ids(ids: np.ndarray, values: pa.Array | None, first: int) -> list[str]:
    """The values of some ids, as text; the ids where there is no vocabulary."""
    texts = []
    for i in ids:
        if values is None:
            texts.append(str(i))
        elif i < first:
            texts.append("(infrequent)")
        else:
            value = values[int(i) - first].as_py()
            texts.append(f"{value:08x}" if pa.types.is_uint64(values.type) else str(value)[:80])
    return texts


def describe_buckets(ids: np.ndarray, edges_E: np.ndarray) -> list[str]:
    """The numbers of some buckets, as text."""
    bounds = [f"{edge:g}" for edge in edges_E]
    upto = [*(f"<= {bound}" for bound in bounds), ""]
    above = ["", *(f"> {bound}" for bound in bounds)]
    return [" and ".join(filter(None, (above[i], upto[i]))) or "any" for i in ids]
