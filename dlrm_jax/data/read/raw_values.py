"""What ids of a prepared dataset stand for: the values of its vocabularies."""

import pathlib
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare.hashes import checked
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.data.values.file_names import existing_file, file_names


def read_vocabulary(directory: pathlib.Path, schema: Schema, table: str) -> Any:
    """The values of a table's vocabulary, a pyarrow.Array in the order of their ids.

    The first has id 1 where the table has an id of rare values (`oov`), else 0. ConfigError for a file that is changed
    or cannot be read.
    """
    import pyarrow.parquet as pq  # Not where nothing was prepared.

    path = existing_file(directory / "vocabularies", table, file_names(schema.tables())[table], ".parquet")
    checked(directory, f"vocabularies/{path.name}")
    try:
        return pq.read_table(path, columns=["value"])["value"].combine_chunks()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def texts_of(directory: pathlib.Path, schema: Schema, table: str, ids: np.ndarray) -> list[str]:
    """What some ids of a table stand for, as text: the values of the log, or the ids where there is no vocabulary."""
    rule = schema.tables()[table][0]
    if rule.ids != "vocabulary":
        return [str(i) for i in ids]
    values, first = read_vocabulary(directory, schema, table), int(rule.oov)
    texts = []
    for i in ids.tolist():
        if i < first:
            texts.append("(infrequent)")
            continue
        if i - first >= len(values):  # A table has a row, even where no value was kept.
            texts.append(str(i))
            continue
        value = values[i - first].as_py()
        texts.append(f"{value:x}" if rule.type == "hex" else str(value))
    return texts
