"""The data sets by which the defaults were chosen, prepared as a newcomer would, and logistic regression on each.

`make(name, shared, folder)` prepares one of DATA_SETS below `folder`. The schema is what `--schema=infer` guesses, but
for what its reader has to mend: which columns are ids, which file is which split.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import scipy.sparse
import shop_log
from sklearn.linear_model import LogisticRegression

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.data.generate import planted
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.dataset import Split as Rows
from dlrm_jax.data.read.prepared import is_prepared, open_prepared
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.schema.schema import SPLITS, Schema, Sparse, Split
from dlrm_jax.model.metrics import auc

PLANTED_ROWS = 100_000
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Inverse strengths of logistic regression's L2, of which the validation AUC chooses."""


def planted_log(path: pathlib.Path) -> None:
    """The first rows of the planted log as text, bags as lists at `|`."""
    data = planted.generate(0, PLANTED_ROWS)
    lines = [",".join(["label", *(feature.name for feature in data.features), *data.dense_names])]
    for part in (data.splits[name] for name in SPLITS):
        assert isinstance(part, Rows)
        for label, dense_N, ids_K in zip(part.label_R, part.dense_RxN, part.ids_RxK, strict=True):
            cells, slot = [str(int(label))], 0
            for feature in data.features:
                bag = ids_K[slot : slot + feature.hotness]
                slot += feature.hotness
                cells.append("|".join(f"{feature.table}{i}" for i in bag if i != EMPTY_SLOT))
            lines.append(",".join([*cells, *(f"{value:.6f}" for value in dense_N)]))
    path.write_text("\n".join(lines) + "\n")


def _as_ids(schema: Schema, *names: str) -> Schema:
    """The schema with these columns as ids, whatever was guessed."""
    taken = {sparse.name for sparse in schema.sparse}
    return dataclasses.replace(
        schema,
        dense=tuple(dense for dense in schema.dense if dense.name not in names),
        sparse=(*(Sparse(name, oov=True) for name in names if name not in taken), *schema.sparse),
    )


def _frappe(shared: pathlib.Path, folder: pathlib.Path) -> tuple[tuple[str, ...], Schema]:
    del folder
    paths = tuple(str(shared / "frappe" / f"{name}.csv") for name in ("train", "valid", "test"))
    by_file = Split("files", val_files="valid.csv", test_files="test.csv")
    return paths, dataclasses.replace(_as_ids(infer(paths), "user", "item", "city"), split=by_file)


def _movielens(shared: pathlib.Path, folder: pathlib.Path) -> tuple[tuple[str, ...], Schema]:
    del folder
    return (str(shared / "ml-100k"),), PRESETS["movielens_100k"][1]()


def _criteo(shared: pathlib.Path, folder: pathlib.Path) -> tuple[tuple[str, ...], Schema]:
    del folder
    paths = (str(shared / "criteo_sample" / "train.csv"),)
    return paths, infer(paths)


def _written(write: Callable[[pathlib.Path], None]) -> Callable:
    def log(shared: pathlib.Path, folder: pathlib.Path) -> tuple[tuple[str, ...], Schema]:
        del shared
        path = folder / "log.csv"
        write(path)
        return (str(path),), infer((str(path),))

    return log


DATA_SETS = {
    "shop": _written(shop_log.write),
    "planted": _written(planted_log),
    "movielens": _movielens,
    "frappe": _frappe,
    "criteo": _criteo,
}


def make(name: str, shared: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Prepare a data set, unless that was done; its directory."""
    output = folder / name
    if not is_prepared(output):
        logs = folder / f"{name}_log"
        logs.mkdir(parents=True, exist_ok=True)
        paths, schema = DATA_SETS[name](shared, logs)
        prepare(paths, output, dataclasses.replace(schema, name=name), Options())
    return output


def _design(directory: pathlib.Path, split: str) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """(one column for each id of each feature and for each number, labels)."""
    data = open_prepared(directory)
    parts = [window for window, _ in data.splits[split].windows(0, 0, False)]
    ids_RxK = np.concatenate([part.ids_RxK for part in parts])
    dense_RxN = np.concatenate([part.dense_RxN for part in parts])
    blocks, slot = [scipy.sparse.csr_matrix(dense_RxN)], 0
    for feature in data.features:
        bags = ids_RxK[:, slot : slot + feature.hotness]
        slot += feature.hotness
        row, place = np.nonzero(bags != EMPTY_SLOT)
        shape = (len(bags), data.table_sizes[feature.table])
        blocks.append(scipy.sparse.csr_matrix((np.ones(len(row)), (row, bags[row, place])), shape=shape))
    return scipy.sparse.hstack(blocks, format="csr"), np.concatenate([part.label_R for part in parts])


def logistic_regression(directory: pathlib.Path) -> dict[str, float]:
    """Validation and test AUC of one-hot logistic regression, its L2 chosen by the former."""
    splits = {name: _design(directory, name) for name in SPLITS}
    best = {"val": 0.0}
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=300).fit(*splits["train"])
        scores = {name: auc(model.decision_function(x), y) for name, (x, y) in splits.items() if name != "train"}
        best = max(best, scores, key=lambda one: one["val"])
    return best
