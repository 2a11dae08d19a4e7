"""A changed byte in a dataset's schema, statistics, vocabularies or splits is refused, not believed."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare import hashes
from dlrm_jax.data.prepare.growth import Past
from dlrm_jax.data.prepare.runs import Part
from dlrm_jax.data.read.prepared import open_prepared, read_json, read_schema
from dlrm_jax.data.schema.schema import Dense, Sparse
from dlrm_jax.serving.artifact.export import make_signature
from dlrm_jax.serving.artifact.written import write_vocabularies
from tests.helpers import tiny_model
from tests.prepared_helpers import digest, prepare_text, schema


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset with a vocabulary of texts, one of numbers, and a dense column that has statistics."""
    rows = "".join(f"{i % 2},{i % 17 / 3},w{i * 7919 % 97},{i % 13}\n" for i in range(300))
    columns = {"dense": (Dense("x", transform="standardise"),), "sparse": (Sparse("c"), Sparse("n", type="int"))}
    return prepare_text(tmp_path_factory.mktemp("prepared"), "label,x,c,n\n" + rows, schema(**columns))


def taken(directory: pathlib.Path, into: pathlib.Path) -> tuple:
    """What training and an export take from a dataset's files: each value's id, how numbers are read, the rows."""
    dataset = open_prepared(directory)
    signature = make_signature(tiny_model(), dataset, "float32")
    into.mkdir()
    write_vocabularies(into, signature, directory)
    rows = dataset.splits["train"].read(np.arange(1))
    job = read_json(directory / "job.json")
    return digest(into), signature.schema, signature.dense_statistics, dataset.table_sizes, rows.ids_RxK.tolist(), job


def counted(directory: pathlib.Path) -> tuple:
    """What --extend goes on from."""
    past = Past.read(directory, read_schema(directory))
    known = [past.known(table, of[0], [Part("train")]) for table, of in past.schema.tables().items()]
    return past.growth, [(t.values.to_pylist(), t.ids_V.tolist(), t.counts_GxV.tolist()) for t in known]


def test_no_flipped_bit_changes_a_value(prepared, tmp_path):
    good = taken(prepared, tmp_path / "good"), counted(prepared)
    files = sorted(path for path in prepared.rglob("*") if path.suffix in (".json", ".parquet"))
    rng, refused = np.random.default_rng(0), 0
    for trial in range(60):
        copy = pathlib.Path(shutil.copytree(prepared, tmp_path / f"{trial}"))
        path = copy / files[trial % len(files)].relative_to(prepared)
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            assert (taken(copy, tmp_path / f"{trial}" / "exported"), counted(copy)) == good, path
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and "anew" in str(error)
        shutil.rmtree(copy)
    assert refused >= 50  # The others are in what dataset_info.json says beside the splits.


def test_shards_of_other_lengths_are_refused(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    info = json.loads((copy / "dataset_info.json").read_text())
    next(split for split in info["splits"] if split["name"] == "train")["shardLengths"] = ["7"]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match=r"dataset_info\.json was changed: it has other shards than hashes\.json"):
        open_prepared(copy)


def test_a_dataset_of_before_is_read_and_said_once(prepared, tmp_path, caplog):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    (copy / "hashes.json").unlink()
    hashes._say_unchecked.cache_clear()
    assert taken(copy, tmp_path / "1") == taken(prepared, tmp_path / "2")
    assert [record.message.count("has no hashes.json") for record in caplog.records] == [1]
