"""Every kind of column that a schema knows, over random logs: serving makes of a raw row what preparation made of it.

The rules are enumerated from the schema's own lists, so that a new one is held to this without being named here.
"""

import csv
import dataclasses
import io
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.schema.schema import DENSE_MISSING, Dense, Sparse
from dlrm_jax.data.schema.sparse import ID_RULES, ORDERS, SPARSE_MISSING, TYPES
from dlrm_jax.data.values import transforms
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.export import make_signature
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.serving.artifact.vocabularies import read_vocabularies
from dlrm_jax.serving.artifact.written import write_vocabularies
from dlrm_jax.training.run_config import ModelOptions
from tests.prepared_helpers import prepare_text, rows_of, schema

NULLS = ("", "NA")
FILLS = {"string": "größe", "int": "-7", "hex": "fF"}
ACCENTED = ["ünïcode ✓", "日本", "e\u0301", "é"]
TEXTS = ["a", "A", " a ", *ACCENTED, "x" * 300, "0", "00", "NaN", "null", 'quo"te', "com,ma", "l\nb"]
INTEGERS = ["0", "-1", "+5", "007", " 12 ", str(2**63 - 1), str(-(2**63)), "123456789", "2", "3"]
HEXES = ["0", "00ff", "FF", "ffffffffffffffff", "8000000000000000", "68fd1e64", "fb936136", " 1a "]
SMALL = ["0", "1", "2", "5", "06"]
NUMBERS = ["0", "-0", "1", "-1.5", "+3", " 2 ", "1e-400", "1e-45", "16777217", "0.1", "1e30", "9" * 20, "nan"]


def every(kind: type, **choices: tuple) -> list[Any]:
    """A column of each combination of settings that the schema allows; `name` counts them."""
    found: list[Any] = []
    for values in itertools.product(*choices.values()):
        try:
            found.append(kind(f"{kind.__name__.lower()}{len(found)}", **dict(zip(choices, values, strict=True))))
        except ConfigError:
            continue
    return found


SOURCES = {"string": "text", "int": "integer", "hex": "hex"}
RULES = {"ids": ID_RULES, "order": ORDERS, "oov": (False, True), "min_count": (1, 3), "modulo": (0, 7), "size": (0, 9)}


def sparse_of(type_: str, missing: str, bags: bool) -> list[Sparse]:
    """All rules for values of a type, but for raw ids: the whole numbers here are larger than any table."""
    column, shape = SOURCES[type_], {}
    if bags:
        column, shape = f"bag_of_{column}", {"separator": ("|",), "hotness": (3,)}
    fill = FILLS[type_] if missing == "fill" else ""
    found = every(Sparse, type=(type_,), missing=(missing,), fill=(fill,), column=(column,), **RULES, **shape)
    return [sparse for sparse in found if sparse.ids != "raw" or sparse.modulo]


def columns(missing_dense: tuple[str, ...], missing_sparse: tuple[str, ...]) -> tuple[tuple, tuple]:
    """(dense, sparse): one of each kind."""
    dense = every(Dense, column=("number",), transform=transforms.names(), missing=missing_dense, fill=(0.0, 2.5))
    kinds = itertools.product(TYPES, missing_sparse, (False, True))
    sparse = [one for kind in kinds for one in sparse_of(*kind)]
    for size, missing in itertools.product((0, 9), missing_sparse):
        sparse.append(Sparse("c", "small", "int", "raw", size, missing=missing, fill="4" if missing == "fill" else ""))
    sparse = [dataclasses.replace(one, name=f"s{i}") for i, one in enumerate(sparse)]
    both = (Sparse("one", "text", table="t"), Sparse("many", "bag_of_text", table="t", separator="|", hotness=4))
    return tuple(dense), (*sparse, *both)


def random_rows(rng: np.random.Generator, count: int, decimal: str) -> list[dict[str, str]]:
    """Rows of texts: every kind of value, and gaps."""

    def one(values: list[str]) -> str:
        return str(rng.choice(NULLS)) if rng.random() < 0.15 else values[int(rng.integers(len(values)))]

    def bag(values: list[str]) -> str:
        return "|".join(one(values) for _ in range(rng.integers(0, 6)))

    kinds = {"text": TEXTS, "integer": INTEGERS, "hex": HEXES}
    return [
        {"label": str(i % 2), "number": one(NUMBERS).replace(".", decimal), "small": one(SMALL)}
        | {name: one(values) for name, values in kinds.items()}
        | {f"bag_of_{name}": bag(values) for name, values in kinds.items()}
        for i in range(count)
    ]


def as_csv(rows: list[dict[str, str]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def typed(row: dict[str, str]) -> dict[str, Any]:
    """The row as JSON has it: null, numbers, lists."""
    out: dict[str, Any] = {}
    for name, text in row.items():
        if name.startswith("bag_of_"):
            out[name] = [None if part in NULLS else part for part in text.split("|")]
        elif text in NULLS or (name == "number" and text == "nan"):
            out[name] = None
        else:
            out[name] = {"label": int, "number": float, "small": int, "integer": int}.get(name, str)(text)
    return out


def reader_of(output: pathlib.Path) -> Reader:
    """What an exported model reads raw rows with."""
    dataset = open_prepared(output)
    model = ModelOptions(embedding_dim=4, bottom_mlp=(4,), top_mlp=(1,)).build(dataset)
    signature, version = make_signature(model, dataset, "float32"), output.parent / "version"
    version.mkdir()
    write_vocabularies(version, signature, output)
    return Reader(signature, read_vocabularies(Version(0, version, {}), signature))


FORMS = {"text": ".", "text with decimal commas": ",", "json": "."}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sample(1)
def test_every_kind_of_column_is_read_as_preparation_read_it(tmp_path, form):
    rows = random_rows(np.random.default_rng(len(form)), 60, FORMS[form])
    dense, sparse = columns(("fill", "mean"), ("empty", "fill"))
    assert {one.transform for one in dense} == set(transforms.names())
    assert {(one.type, one.ids) for one in sparse} == set(itertools.product(TYPES, ID_RULES)) - {("string", "raw")}
    of = schema(dense=dense, sparse=sparse, null_values=NULLS, decimal=FORMS[form])
    raw = [typed(row) for row in rows] if form == "json" else rows
    text = "".join(json.dumps(row) + "\n" for row in raw) if form == "json" else as_csv(rows)
    output = prepare_text(tmp_path, text, of, "log.jsonl" if form == "json" else "log.csv")
    want = rows_of(output)
    reader = reader_of(output)
    dense_RxN, ids_RxK, _ = reader.read([{name: row[name] for name in reader.columns} for row in raw])
    for i, one in enumerate(dense):  # As values: Arrow takes -0 and 0 for one.
        np.testing.assert_array_equal(dense_RxN[:, i], want.dense_RxN[:, i], repr(one))
    start = 0
    for one in sparse:
        slots = slice(start, start + one.hotness)
        np.testing.assert_array_equal(ids_RxK[:, slots], want.ids_RxK[:, slots], repr(one))
        start += one.hotness


BAD = {
    "number": ["x", "1e400", "-5", "2e30", "inf", "1_0", "--1"],
    "integer": ["1.5", str(2**63), "x", "1_0", "٣x"],
    "hex": ["xyz", "0x1f", "1" * 17, "-1"],
    "small": ["-1", "9", "99", str(2**40)],
}


@pytest.mark.parametrize(("column", "decimal"), [*((column, ".") for column in BAD), ("number", ",")])
def test_what_preparation_refuses_serving_refuses(tmp_path, column, decimal):
    """Missing values where they are an error, and values that are none of their column's type."""
    rng = np.random.default_rng(len(column))
    dense, sparse = columns(DENSE_MISSING, SPARSE_MISSING)
    dense = tuple(one for one in dense if one.column == column)
    sparse = tuple(one for one in sparse if one.column == column) or (Sparse("c", "text"),)
    rows = random_rows(rng, 60, decimal)
    for row in rows[::3]:
        row[column] = str(rng.choice(BAD[column] if decimal == "." else ["1.5", "1,5,5"]))
    of = schema(dense=dense, sparse=sparse, null_values=NULLS, decimal=decimal)
    output = prepare_text(tmp_path, as_csv(rows), of, on_bad_row="skip_and_count")
    want, reader = rows_of(output), reader_of(output)
    place = {int(row): i for i, row in enumerate(want.row_R)}
    assert len(place) > 20 and len(rows) - len(place) > 20
    for i, row in enumerate(rows):
        asked = [{name: row[name] for name in reader.columns}]
        if i not in place:
            with pytest.raises(BadRequest):
                reader.read(asked)
            continue
        dense_1xN, ids_1xK, _ = reader.read(asked)
        np.testing.assert_array_equal(dense_1xN[0], want.dense_RxN[place[i]], str(row))
        np.testing.assert_array_equal(ids_1xK[0], want.ids_RxK[place[i]], str(row))
