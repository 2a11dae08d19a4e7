"""Whether ids of a run's data stand for what they stood for where its weights come from."""

import logging
from typing import Any

from dlrm_jax.config import ConfigError, differences, require, tell
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.raw_values import read_vocabulary
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.training.origin import Origin

_LOG = logging.getLogger("dlrm_jax")
_DECIDE = ("type", "ids", "size", "modulo", "oov", "buckets", "part", "time_format", "cross")
"""Fields of Sparse by which a value has its id, or its place among the values."""
_REMEDY = "prepare the new rows with --extend of the data there"


def require_known_ids(origin: Origin, dataset: Dataset) -> None:
    """ConfigError for a table whose ids are others; where its vocabularies cannot be compared, that is said."""
    if origin.schema is None and dataset.schema is None:
        return  # Generated, both: ids are those of the generator.
    if origin.schema is None or dataset.schema is None:
        _LOG.warning("%s is of other data, not prepared alike: whether ids mean the same is not known", origin.name)
        return
    then, now = (schema_from_dict(dict(schema), "the schema") for schema in (origin.schema, dataset.schema))
    common = [table for table in now.tables() if table in then.tables()]
    for table in common:
        here, there = ({table: _rule(schema.tables()[table][0])} for schema in (now, then))
        different = differences(here, there)
        require(
            not different, f"--init_from: {origin.name}: ids are given otherwise (here != there): {tell(different)}"
        )
    if dataset.directory is None or origin.data is None:
        _LOG.warning("the data of %s are not where they were: that ids mean the same is not checked", origin.name)
        return
    if dataset.directory.resolve() == origin.data.resolve():
        return
    for table in common:
        if now.tables()[table][0].ids != "vocabulary":
            continue
        old, new = read_vocabulary(origin.data, then, table), read_vocabulary(dataset.directory, now, table)
        if not new.slice(0, len(old)).equals(old):
            raise ConfigError(
                f"--init_from: {origin.name}: ids of table {table!r} stand for other values in {dataset.directory} "
                f"than in {origin.data}; {_REMEDY}"
            )


def _rule(sparse: Sparse) -> dict[str, Any]:
    return {name: getattr(sparse, name) for name in _DECIDE}
