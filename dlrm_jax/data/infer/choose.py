"""The schema of a log by the name that a command gives it: a file, a preset, or infer."""

import dataclasses
import pathlib

from dlrm_jax.config import ConfigError
from dlrm_jax.data.schema import schema_io
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.schema.schema import Schema


def choose_schema(name: str, paths: tuple[str, ...]) -> Schema:
    """The schema that --schema names."""
    if name == "infer":
        from dlrm_jax.data.infer.infer import infer

        return infer(paths)
    if name in PRESETS:
        schema = PRESETS[name][1]()
        if schema.format == "mlperf_multi_hot":
            from dlrm_jax.data.formats.array_source import fit_hotness

            return fit_hotness(schema, paths[0])
        if schema.format == "text" and schema.columns and _has_header(paths[0], schema):
            return dataclasses.replace(schema, header=True, columns=(), delimiter=",", quote='"')
        return schema
    path = pathlib.Path(name)
    if path.is_file():
        return schema_io.load(path)
    raise ConfigError(f"--schema={name} is neither a file, nor infer, nor one of {', '.join(PRESETS)}")


def _has_header(path: str, schema: Schema) -> bool:
    """Whether a file that usually has no header has one (as the public sample of Criteo's log, a CSV)."""
    from dlrm_jax.data.formats.records import read_head

    first = read_head(path, 1 << 16).split(b"\n")[0].decode("utf8", "replace")
    return set(schema.source_columns()) <= {name.strip().strip('"') for name in first.split(",")}
