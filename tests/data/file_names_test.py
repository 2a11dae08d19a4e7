"""Names of columns become safe file names: never another directory, never one file for two names."""

import urllib.parse

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.schema.schema import Label, Sparse
from dlrm_jax.data.values.file_names import existing_file, file_names
from tests.prepared_helpers import schema

ODD = [
    "user",
    "User",
    "user/home",
    "vocabularies/user",
    "../../evil",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "a b",
    "a%20b",
    "~",
    "Straße",
    "x" * 300,
    "x" * 301,
    "日" * 100,
    ".hidden",
    "C1",
]


@given(st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=200)), unique=True))
def test_files_are_as_many_as_names_and_stay_where_they_are(names):
    files = file_names(names)
    assert list(files) == names
    assert len({file.lower() for file in files.values()}) == len(names)
    for name, file in files.items():
        assert file and len(file) <= 167 and set(file) <= set("%~_.-" + LETTERS) and not file.startswith(".")
        if "~" not in file:
            assert urllib.parse.unquote(file) == name


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.mark.parametrize("name", ["C1", "user_id", "user-id", "I13", "v1.2"])
def test_plain_names_stay(name):
    assert file_names([name]) == {name: name}


def test_a_log_with_odd_names_writes_into_its_output_alone(tmp_path):
    columns = ("label", *ODD)
    text = "".join(",".join([str(i % 2), *(f"{j}v{i % (j + 2)}" for j in range(len(ODD)))]) + "\n" for i in range(60))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    log = tmp_path / "deep" / "er" / "log.csv"
    log.write_text(text)
    of = schema(dense=(), sparse=tuple(map(Sparse, ODD)), header=False, columns=columns)
    prepare((str(log),), tmp_path / "deep" / "er" / "out", of)
    vocabularies = tmp_path / "deep" / "er" / "out" / "vocabularies"
    files = file_names(ODD)
    assert sorted(path.name for path in vocabularies.iterdir()) == sorted(f"{file}.parquet" for file in files.values())
    for j, name in enumerate(ODD):
        values = pq.read_table(vocabularies / f"{files[name]}.parquet")["value"].to_pylist()
        assert values == [f"{j}v{i}" for i in range(j + 2)]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and "out" not in path.parts) == [
        "log.csv"
    ]


def test_files_under_the_plain_name_are_found(tmp_path):
    """Datasets had these before."""
    for name in ("a b", "Straße"):
        (tmp_path / f"{name}.parquet").touch()
        safe = file_names([name])[name]
        assert existing_file(tmp_path, name, safe, ".parquet").name == f"{name}.parquet"
        (tmp_path / f"{safe}.parquet").touch()
        assert existing_file(tmp_path, name, safe, ".parquet").name == f"{safe}.parquet"
    for name in ("../a b", "x" * 300, "a\0b", "gone"):
        safe = file_names([name])[name]
        assert existing_file(tmp_path, name, safe, ".parquet") == tmp_path / f"{safe}.parquet"


def test_a_long_dataset_name_is_refused():
    with pytest.raises(ConfigError, match="is longer than 100 bytes; files are named after it"):
        schema(name="n" * 101, label=Label("label"))
