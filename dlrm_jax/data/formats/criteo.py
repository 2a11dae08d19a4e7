"""Criteo Display Advertising ("Kaggle"): a label, 13 counts, 26 hashed categories; transformed as the reference does.

See getCriteoAdData and CriteoDataset in facebookresearch/dlrm (data_utils.py, dlrm_data_pytorch.py): missing is 0,
counts below 0 are 0 and enter as log(count + 1), categories get ids in order of first appearance over the whole log.
The log is cut into seven equal "days": train is the first six, test and val the halves of the seventh.
"""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.config import ConfigError, FeatureConfig
from dlrm_jax.data.formats import text
from dlrm_jax.data.read.dataset import Dataset, Split

NUM_DAYS = 7
DENSE_NAMES = tuple(f"I{i}" for i in range(1, 14))
SPARSE_NAMES = tuple(f"C{i}" for i in range(1, 27))
FILE_NAMES = ("train.txt", "train.csv")


def read(data_dir: str, max_rows_per_table: int = 0) -> Dataset:
    """The data set of `train.txt` (tab separated, no header) or `train.csv` (header Id, Label, I1-I13, C1-C26).

    `max_rows_per_table` > 0 takes category values modulo it first (the reference's --max-ind-range).
    """
    path = text.find_file(data_dir, FILE_NAMES)
    label_R, counts_RxN, ids_RxK, sizes = read_columns(path, max_rows_per_table)
    dense_RxN = np.log(counts_RxN.astype(np.float32) + 1)
    days = np.array_split(np.arange(len(label_R)), NUM_DAYS)
    test, val = np.array_split(days[-1], 2)
    rows_of = {"train": np.concatenate(days[:-1]), "val": val, "test": test}
    return Dataset(
        name="criteo_kaggle",
        dense_names=DENSE_NAMES,
        features=tuple(FeatureConfig(name, name) for name in SPARSE_NAMES),
        table_sizes=dict(zip(SPARSE_NAMES, sizes, strict=True)),
        splits={
            name: Split(dense_RxN[rows], ids_RxK[rows], label_R[rows].astype(np.float32), rows)
            for name, rows in rows_of.items()
        },
    )


def read_columns(
    path: pathlib.Path, max_rows_per_table: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """(label_R, counts_RxN, ids_RxK, rows of each table): integers, before the logarithm and the split."""
    header = path.suffix == ".csv"
    table = text.read_strings(path, "," if header else "\t", None if header else ("Label", *DENSE_NAMES, *SPARSE_NAMES))
    missing = [name for name in ("Label", *DENSE_NAMES, *SPARSE_NAMES) if name not in table.column_names]
    if missing:
        raise ConfigError(f"{path}: no column {missing[0]} in the header; expected Label, I1 to I13, C1 to C26")
    if len(table) == 0:
        raise ConfigError(f"{path} has a header but no rows")
    first_line = 2 if header else 1
    label_R = text.to_integers(path, "Label", table["Label"], first_line).to_numpy()
    bad = np.flatnonzero((label_R != 0) & (label_R != 1))
    if len(bad):
        raise ConfigError(f"{path}, line {first_line + bad[0]}, column Label: {label_R[bad[0]]} is neither 0 nor 1")
    counts = [np.maximum(_integers(path, table, name, first_line), 0) for name in DENSE_NAMES]
    ids, sizes = [], []
    for name in SPARSE_NAMES:
        values = pa.array(_integers(path, table, name, first_line, base=16))
        if max_rows_per_table:
            values = pa.array(values.to_numpy() % max_rows_per_table)
        # dictionary_encode numbers values in order of first appearance.
        encoded = pc.dictionary_encode(values)
        ids.append(encoded.indices.to_numpy())
        sizes.append(len(encoded.dictionary))
    return label_R, np.stack(counts, axis=1).astype(np.int32), np.stack(ids, axis=1).astype(np.int32), sizes


def _integers(path: pathlib.Path, table: pa.Table, name: str, first_line: int, base: int = 10) -> np.ndarray:
    column = table[name]
    filled = pc.if_else(pc.equal(column, ""), "0", column)
    return text.to_integers(path, name, filled, first_line, base).to_numpy()
