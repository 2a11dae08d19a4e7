"""All sparse columns of a chunk -> their bags: each of its column of the log, or of other sparse columns (cross)."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.data.values.bags import Bags, Elements, read_bags
from dlrm_jax.data.values.columns import Bad
from dlrm_jax.data.values.decimals import as_written, with_points
from dlrm_jax.data.values.derived import as_text, integers_of


def read_sparse(schema: Schema, arrays: Mapping[str, pa.Array]) -> list[tuple[Bags, list[Bad]]]:
    """(bags, bad rows) of each sparse column, from the columns of the log."""
    by_name = {sparse.name: sparse for sparse in schema.sparse}
    nulls = schema.null_values

    def array_of(sparse: Sparse) -> pa.Array:
        array = arrays[sparse.source]
        return with_points(array, schema.decimal, nulls) if sparse.buckets else array

    out = []
    for sparse in schema.sparse:
        if sparse.cross:
            parts = [by_name[name] for name in sparse.cross]
            crossed = crossed_texts([(part, Elements.of(part, array_of(part), nulls)) for part in parts])
            out.append(read_bags(sparse, crossed, ()))
            continue
        array = array_of(sparse)
        bags, bad = read_bags(sparse, array, nulls)
        out.append((bags, bad if array is arrays[sparse.source] else as_written(bad, arrays[sparse.source])))
    return out


def crossed_texts(parts: list[tuple[Sparse, Elements]]) -> pa.DictionaryArray:
    """Of each row the values of several columns as one text (`one_text.joined`), by first appearance; null where one of
    them is missing."""
    index_R = np.zeros(len(parts[0][1].index_hxR[0]), np.int64)
    texts = pa.array([""])
    for i, (sparse, elements) in enumerate(parts):
        more = _escaped(_texts(sparse, elements.values))
        mine_R = elements.index_hxR[0]
        missing_R = (index_R < 0) | (mine_R < 0)
        pairs = pa.array(index_R * max(len(more), 1) + mine_R, mask=missing_R).dictionary_encode()
        before, mine = np.divmod(pairs.dictionary.to_numpy(), max(len(more), 1))
        left, right = texts.take(pa.array(before)), more.take(pa.array(mine))
        texts = pc.binary_join_element_wise(left, right, " & ") if i else right
        index_R = pairs.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return pa.DictionaryArray.from_arrays(pa.array(index_R.astype(np.int32), mask=index_R < 0), texts)


def _texts(sparse: Sparse, values: pa.Array) -> pa.Array:
    """What values are in a cross: texts as they are, whole numbers in decimal, those of hex without a sign."""
    if sparse.value_type == "string":
        return as_text(values).fill_null("")
    integers, _ = integers_of(sparse, values)  # Rows of wrong ones are bad already.
    return pc.cast(pa.array(integers.view(np.uint64) if sparse.type == "hex" else integers), pa.string())


def _escaped(texts: pa.Array) -> pa.Array:
    return pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), "&", "\\&")
