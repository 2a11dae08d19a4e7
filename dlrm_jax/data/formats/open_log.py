"""Which reader a log needs: by the schema's format, else by the file's name and first bytes."""

import pathlib

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.formats import movielens
from dlrm_jax.data.formats.array_source import ArraySource
from dlrm_jax.data.formats.encoding import is_utf8
from dlrm_jax.data.formats.readers import READERS
from dlrm_jax.data.formats.records import read_head
from dlrm_jax.data.formats.source import Source
from dlrm_jax.data.formats.table_source import ParquetSource, TableSource
from dlrm_jax.data.formats.text_source import TextSource
from dlrm_jax.data.schema.schema import MOVIELENS, Schema

_BY_SUFFIX = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".npz": "dlrm_npz",
    ".bin": "mlperf_bin",
    ".npy": "torchrec_npy",
}
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2")


def guess_format(path: str) -> str:
    """The format of a file, by its suffix (that of a compressed file under the compression's) and first bytes."""
    name = pathlib.Path(path)
    suffix = name.with_suffix("").suffix if name.suffix in _COMPRESSED else name.suffix
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    head = read_head(path, 4)
    return "parquet" if head == b"PAR1" else "jsonl" if head.lstrip()[:1] == b"{" else "text"


def log_files(paths: tuple[str, ...], schema: Schema) -> tuple[str, ...]:
    """The files that are read: `paths`, or of a directory that one reader takes as a whole, those in it."""
    if schema.format not in MOVIELENS:
        return paths
    require(len(paths) == 1, f"--input: give MovieLens' directory alone, not {len(paths)} files")
    return movielens.find_files(paths[0])


def open_log(paths: tuple[str, ...], schema: Schema) -> Source:
    """The reader of a log; ConfigError for a path that is no file."""
    kind = schema.format or guess_format(paths[0])
    if kind in READERS.all():
        return READERS.get(kind)(paths, schema)
    where = f"schema: {paths[0]} has format {kind}"
    require(is_utf8(schema.encoding) or kind in ("text", "jsonl"), f"{where}; encoding is for text and JSON lines")
    require(schema.decimal == "." or kind in ("text", "parquet"), f"{where}; decimal is for texts in delimited files")
    if kind in MOVIELENS:
        log_files(paths, schema)
        table, row_R = movielens.read_table(paths[0], by_time=kind == "movielens_by_time")
        return TableSource(paths[0], table, schema, row_R)
    for path in paths:
        if not pathlib.Path(path).is_file():
            raise ConfigError(f"--input: {path} is not a file; give files or a glob such as {path}/*")
    if kind == "parquet":
        return ParquetSource(paths, schema)
    if kind in ("text", "jsonl"):
        return TextSource(paths, schema, kind == "jsonl")
    return ArraySource(paths, schema, kind)
