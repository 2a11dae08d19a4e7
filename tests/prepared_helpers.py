"""Prepare small logs in tests, and read back what came of them."""

import hashlib
import pathlib

from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.schema.schema import Dense, Label, Schema, Sparse, Split

ALL_TRAIN = Split("files", test_files="nothing")


def schema(**changes) -> Schema:
    """label, one dense column x, one sparse column c; everything is train."""
    fields = {"name": "log", "label": Label("label"), "dense": (Dense("x"),), "sparse": (Sparse("c"),)}
    return Schema(**(fields | {"split": ALL_TRAIN} | changes))


def prepare_text(
    directory: pathlib.Path, text: str | bytes, of: Schema, name: str = "log.csv", **options
) -> pathlib.Path:
    """Write `text` to a file and prepare it; the output directory."""
    path = directory / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    output = directory / "out"
    prepare((str(path),), output, of, Options(**options))
    return output


def rows_of(output: pathlib.Path, split: str = "train"):
    """All rows of a split, in order, in memory."""
    return open_prepared(output).splits[split].whole()


def csv_rows(rows: list[tuple]) -> str:
    return "label,x,c\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def digest(directory: pathlib.Path) -> dict[str, str]:
    """A hash of every file below a directory, by its path there."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def in_small_blocks(patch, rows: int = 64, blocks_per_window: int = 2) -> None:
    """Blocks of few rows, and few of them in a window, so that a small log has many of both."""
    for module in ("prepare.blocks", "read.prepared"):
        patch.setattr(f"dlrm_jax.data.{module}.BLOCK_ROWS", rows)
    patch.setattr("dlrm_jax.data.read.prepared.WINDOW_BLOCKS", blocks_per_window)
