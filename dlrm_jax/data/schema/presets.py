"""Schemas of known logs and formats, by name."""

from collections.abc import Callable

from dlrm_jax.data.schema.schema import Dense, Label, Schema, Sparse, Split

CRITEO_DENSE = tuple(f"I{i}" for i in range(1, 14))
CRITEO_SPARSE = tuple(f"C{i}" for i in range(1, 27))


def _criteo(name: str, split: Split, **sparse: object) -> Schema:
    """Criteo's text: label, 13 counts, 26 hexadecimal categories; a missing count and a missing category are 0."""
    rule: dict = {"type": "hex", "missing": "fill", "fill": "0"} | sparse
    return Schema(
        name=name,
        label=Label("Label"),
        dense=tuple(Dense(column, transform="log1p") for column in CRITEO_DENSE),
        sparse=tuple(Sparse(column, **rule) for column in CRITEO_SPARSE),
        split=split,
        format="text",
        columns=("Label", *CRITEO_DENSE, *CRITEO_SPARSE),
        header=False,
        quote="",
    )


def _arrays(name: str, kind: str, split: Split, transform: str) -> Schema:
    """Criteo as arrays of numbers, preprocessed by another tool: ids are final."""
    return Schema(
        name=name,
        label=Label("Label"),
        dense=tuple(Dense(column, transform=transform, missing="error") for column in CRITEO_DENSE),
        sparse=tuple(Sparse(column, type="int", ids="raw", missing="error") for column in CRITEO_SPARSE),
        split=split,
        format=kind,
    )


_MULTI_HOT_SIZES = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)


def _multi_hot() -> Schema:
    sparse = tuple(
        Sparse(column, type="int", ids="raw", hotness=hotness, missing="error")
        for column, hotness in zip(CRITEO_SPARSE, _MULTI_HOT_SIZES, strict=True)
    )
    base = _arrays("mlperf_multi_hot", "mlperf_multi_hot", _LAST_DAY, "none")
    return Schema(base.name, base.label, base.dense, sparse, split=base.split, format=base.format)


def _movielens(name: str, kind: str = "movielens", split: Split = Split("order")) -> Schema:  # noqa: B008
    # The reader joins the three files, and makes the columns and the order of rows that movielens.py describes.
    return Schema(
        name=name,
        label=Label("label"),
        dense=tuple(Dense(column) for column in ("age", "year", "time", "hour")),
        sparse=(
            Sparse("user", type="int", order="value"),
            Sparse("item", type="int", order="value"),
            Sparse("gender", order="value"),
            Sparse("occupation", order="value"),
            Sparse("zip", order="value"),
            Sparse("genres", hotness=6, order="value"),
        ),
        timestamp="timestamp",
        split=split,
        format=kind,
    )


def _bars(name: str, label: str, sparse: tuple[Sparse, ...], dense: tuple[Dense, ...] = ()) -> Schema:
    """A data set as BARS publishes it (github.com/reczoo/BARS, the dataset_config of its runs): train.csv, valid.csv,
    test.csv with a header.

    BARS counts what is rare, and knows what is known, by train.csv alone; here all three count.
    """
    split = Split("files", val_files="valid.*", test_files="test.*")
    return Schema(name=name, label=Label(label), dense=dense, sparse=sparse, split=split)


def _criteo_x1() -> Schema:
    # Numbers that AFN's authors scaled, ids that they gave.
    dense = tuple(Dense(column) for column in CRITEO_DENSE)
    return _bars("criteo_x1", "label", tuple(Sparse(column, type="int") for column in CRITEO_SPARSE), dense)


def _criteo_x4() -> Schema:
    # Infrequent values, and in BARS missing categories too, share one id; here a missing one has an id of its own.
    rule: dict = {"missing": "fill", "fill": "0", "min_count": 10, "oov": True}
    numbers = tuple(Sparse(column, buckets="log_squared", **rule) for column in CRITEO_DENSE)
    return _bars("criteo_x4", "Label", numbers + tuple(Sparse(c, type="hex", **rule) for c in CRITEO_SPARSE))


_AVAZU_COLUMNS = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22))),
)


def _avazu_x4() -> Schema:
    rare: dict = {"min_count": 2, "oov": True}
    parts = tuple(
        Sparse(part, column="hour", part=part, time_format="%y%m%d%H", **rare)
        for part in ("hour", "weekday", "weekend")
    )
    columns = tuple(Sparse(column, **rare) for column in _AVAZU_COLUMNS)
    return _bars("avazu_x4", "click", (parts[0], *columns, *parts[1:]))


_FRAPPE_COLUMNS = (
    *("user", "item", "daytime", "weekday", "isweekend"),
    *("homework", "cost", "weather", "country", "city"),
)


_DAYS = Split("last_part", parts=7, first_half="test")
_LAST_DAY = Split("last_part", parts=0, first_half="val")

PRESETS: dict[str, tuple[str, Callable[[], Schema]]] = {
    "criteo_kaggle": (
        "Criteo Display Advertising, text; seven equal days, the last halved: test, val (as the reference)",
        lambda: _criteo("criteo_kaggle", _DAYS),
    ),
    "criteo_kaggle_hash": (
        "the same with each category hashed into 1,000,000 buckets: no vocabulary, no memory",
        lambda: _criteo("criteo_kaggle_hash", _DAYS, ids="hash", size=1_000_000),
    ),
    "criteo_terabyte": (
        "Criteo 1TB, text, a file a day; the last file halved: val, test (the names as MLPerf has them; the reference "
        "swaps them); categories modulo 40,000,000 before ids are given",
        lambda: _criteo("criteo_terabyte", _LAST_DAY, modulo=40_000_000),
    ),
    "dlrm_npz": (
        "the reference's processed .npz (X_int, X_cat, y): seven equal days, the last halved: test, val",
        lambda: _arrays("dlrm_npz", "dlrm_npz", _DAYS, "log1p"),
    ),
    "mlperf_bin": (
        "the reference's binary rows, 40 int32 each; the last file halved: val, test",
        lambda: _arrays("mlperf_bin", "mlperf_bin", _LAST_DAY, "log1p"),
    ),
    "torchrec_npy": (
        "TorchRec's day_i_{dense,sparse,labels}.npy (give the dense files); the last day halved: val, test",
        lambda: _arrays("torchrec_npy", "torchrec_npy", _LAST_DAY, "none"),
    ),
    "mlperf_multi_hot": (
        "MLPerf's day_i_sparse_multi_hot.npz (give these), with day_i_{dense,labels}.npy beside them",
        _multi_hot,
    ),
    "movielens_100k": (
        "MovieLens 100k, a directory: rated 4 or 5? 80/10/10 at random",
        lambda: _movielens("movielens_100k"),
    ),
    "movielens_100k_time": (
        "the same 80/10/10 by time",
        lambda: _movielens("movielens_100k_time", "movielens_by_time"),
    ),
    "movielens_100k_week": (
        "the same by weeks, for dlrm_jax.online: the last one test, the one before val",
        lambda: _movielens("movielens_100k_week", "movielens_by_time", Split("time", val=1, test=1, period="1w")),
    ),
    "movielens_1m": ("MovieLens 1M, a directory: rated 4 or 5? 80/10/10 at random", lambda: _movielens("movielens_1m")),
    "frappe_x1": (
        "Frappe as BARS has it: use of apps in ten contexts, no numbers; train.csv, valid.csv, test.csv",
        lambda: _bars("frappe_x1", "label", tuple(map(Sparse, _FRAPPE_COLUMNS))),
    ),
    "criteo_x1": ("Criteo as BARS and AFN have it: scaled numbers, ids; train.csv, valid.csv, test.csv", _criteo_x1),
    "criteo_x4": (
        "Criteo as BARS (Criteo_x4_001) and AutoInt have it: numbers in buckets of floor(log(x)^2), values that occur "
        "less than ten times share an id; train.csv, valid.csv, test.csv",
        _criteo_x4,
    ),
    "avazu_x1": (
        "Avazu as BARS and AFN have it: 22 columns of ids; train.csv, valid.csv, test.csv",
        lambda: _bars("avazu_x1", "label", tuple(Sparse(f"feat_{i}", type="int") for i in range(1, 23))),
    ),
    "avazu_x4": (
        "Avazu as BARS (Avazu_x4_001) and AutoInt have it: hour, weekday and weekend of the time, values that occur "
        "once share an id; train.csv, valid.csv, test.csv",
        _avazu_x4,
    ),
    "movielenslatest_x1": (
        "MovieLens' tags as BARS and AFN have them: user, film, tag; train.csv, valid.csv, test.csv",
        lambda: _bars(
            "movielenslatest_x1",
            "label",
            tuple(Sparse(column, type="int") for column in ("user_id", "item_id", "tag_id")),
        ),
    ),
}
