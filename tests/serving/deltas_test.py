"""Deltas: exactly the rows that changed, laid over files or written into memory, equal to the bit to a whole export."""

import asyncio
import json
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact.export_delta import fold
from dlrm_jax.serving.artifact.loaded import OneDevice, Servable
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.store import open_alone, open_version, write_version
from dlrm_jax.serving.artifact.weights import ArrayFile, read_index
from dlrm_jax.serving.http.repository import _updated
from dlrm_jax.serving.http.telemetry import Telemetry
from dlrm_jax.training.options import ShardingOptions
from tests.following import Following
from tests.helpers import random_batch, tiny_model, until
from tests.in_process import call
from tests.server_process import running
from tests.serving_helpers import export_change, export_state, learned, lively_state
from tests.tables.native_test import needs_compiler

SIZES = (4, 16)
MOVED = [{"user": [0, 3, 10], "item": [6]}, {"user": [3, 4], "flag": [0]}]
FLOATS, PACKED = ("bfloat16", {}), ("int8", {"learned_pooling": True})


def mesh(sharding):
    return engine_maker(ShardingOptions(sharding=sharding, mesh="data:2,model:2"), max(SIZES))


NATIVE = {"marks": needs_compiler}
ENGINES = [
    pytest.param(FLOATS, OneDevice, id="one device, bfloat16"),
    pytest.param(PACKED, OneDevice, id="one device, int8"),
    pytest.param(PACKED, mesh("row_wise"), id="row_wise, int8"),
    pytest.param(FLOATS, mesh("column_wise"), id="column_wise, bfloat16"),
    pytest.param(FLOATS, NativeCpu, id="native, bfloat16", **NATIVE),
    pytest.param(PACKED, NativeCpu, id="native, int8", **NATIVE),
]
BOTH, ONE = (
    pytest.mark.parametrize("chain", kinds, ids=[kind for kind, _ in kinds], indirect=True)
    for kinds in ([FLOATS, PACKED], [FLOATS])
)


@pytest.fixture(scope="module")
def chain(request, tmp_path_factory):
    """(model, MODEL_DIR of a whole version and two deltas, a directory of the same three exported as a whole)."""
    kind, changes = request.param
    model, folder = tiny_model(**changes), tmp_path_factory.mktemp("chain")
    state = lively_state(model)
    export_state(folder / "chain", model, state, kind)
    export_state(folder / "whole", model, state, kind)
    for i, rows in enumerate(MOVED):
        state = learned(state, model, rows, by=0.3 + i)
        export_change(folder / "chain", open_version(folder / "chain", i + 1), model, state)
        export_state(folder / "whole", model, state, kind)
    return model, folder / "chain", folder / "whole"


def arrays(version) -> dict[str, np.ndarray]:
    """All files of a version's tables, with what its deltas lay over them."""
    return {
        table: ArrayFile(version, file, stored.dtype).whole()
        for stored in read_index(version).values()
        for table, file in zip(stored.tables, stored.files, strict=False)
    }


@BOTH
def test_a_delta_has_the_rows_whose_bits_differ_and_no_other(chain):
    _, deltas, whole = chain
    before = open_version(whole, 1)
    for number, moved in ((2, MOVED[0]), (3, MOVED[1])):
        delta, after = open_alone(deltas, number), open_version(whole, number)
        then, now = arrays(before), arrays(after)
        for stored in read_index(after).values():
            for table, file in zip(stored.tables, stored.files, strict=False):
                path = delta.directory / file.replace(".npy", ".rows.npy")
                listed = np.load(path).tolist() if path.exists() else []
                differ = (then[table].view(np.uint8) != now[table].view(np.uint8)).any(axis=1)
                assert listed == np.flatnonzero(differ).tolist()
                assert listed == moved.get(table.removesuffix("/pooling_weights"), [])
        before = after


@pytest.mark.parametrize(("chain", "engine"), ENGINES, indirect=["chain"])
@pytest.mark.sample(4)
def test_written_into_memory_or_read_with_what_it_changes_it_scores_as_a_whole_export(chain, engine):
    model, deltas, whole = chain
    batch = random_batch(model, 30, 1)
    inputs = batch.dense_BxN, batch.ids_BxK
    servable = Servable(open_version(deltas, 1), SIZES, make_engine=engine)
    for number in (2, 3):
        want = load(whole, number, SIZES, engine).predict(*inputs)
        first, servable = servable, servable.changed_by(open_alone(deltas, number))()
        for held in (servable, first):  # Who holds the one before scores by the new one too, and is told so.
            scores = held.score(*held.checked(*inputs))
            np.testing.assert_array_equal(scores.probability, want)
            assert scores.version == number
        np.testing.assert_array_equal(load(deltas, number, SIZES, engine).predict(*inputs), want)


@BOTH
def test_a_chain_that_is_folded_is_a_whole_export_file_by_file(chain, tmp_path):
    _, deltas, whole = chain
    folded, direct = fold(open_version(deltas), tmp_path), open_version(whole, 3)
    assert folded.manifest["files"] == direct.manifest["files"]
    of_one = {"version"}
    assert {k: v for k, v in folded.manifest.items() if k not in of_one} == {
        k: v for k, v in direct.manifest.items() if k not in of_one
    }
    with pytest.raises(ConfigError, match="name another directory"):
        fold(open_version(deltas), deltas)


@ONE
def test_the_command_folds_and_refuses_what_it_cannot_do_in_one_line(chain, tmp_path):
    _, deltas, whole = chain
    said = json.loads(call("export", f"--fold={deltas / '2'}", f"--out={tmp_path}").splitlines()[-1])
    assert said["version"] == 1 and open_version(tmp_path).manifest["files"] == open_version(whole, 2).manifest["files"]
    out = f"--out={deltas}"
    for flags, words in {
        (): "give either --workdir, of a training run, or --fold, a version",
        ("--workdir=x", f"--fold={deltas}"): "give either --workdir",
        (f"--fold={deltas}", "--tables=int8"): "--tables has no effect with --fold: a version is written as it is",
        ("--workdir=x", "--delta_from=last"): "--delta_from=last is no version; give its number, or newest",
        ("--workdir=x", "--delta_from=9"): "has no version 9; it has 1, 2, 3",
        ("--workdir=x", "--delta_from=3", "--tables=int8"): "version 3 has tables of bfloat16, and so has what changes",
        ("--workdir=x", "--delta_from=3", "--spare_rows=1"): "--spare_rows is for a whole version",
        ("--workdir=x", "--spare_rows=-1"): "--spare_rows=-1; give a share of the rows, from 0 to 10",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            call("export", out, *flags)


@pytest.fixture
def spoilt(chain, tmp_path):
    """A copy of the chain's whole version and its first delta."""
    return shutil.copytree(chain[1], tmp_path / "model", ignore=shutil.ignore_patterns("3"))


def again(model_dir, change, **facts):
    """The delta once more with what `change` does to its files, hashed anew: only what it says is wrong."""
    said = json.loads((model_dir / "2" / "manifest.json").read_text())

    def write(directory):
        shutil.copytree(model_dir / "2", directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        change(directory)

    kept = {name: value for name, value in said.items() if name not in ("format_version", "version", "files")}
    return write_version(model_dir, write, kept | facts).number


def rows_of(name, change):
    """A change of an array of a delta's first table."""

    def changed(directory):
        path = next((directory / "tables").glob(f"000*{name}.npy"))
        np.save(path, change(np.load(path)))

    return changed


def dense(change):
    def changed(directory):
        path = next((directory / "weights").glob("*kernel.npy"))
        np.save(path, change(np.load(path)))

    return changed


def without(pattern):
    return lambda directory: next(directory.glob(pattern)).unlink()


def other_schema(directory):
    signature = json.loads((directory / "signature.json").read_text())
    signature["features"][0]["name"] = "other"
    (directory / "signature.json").write_text(json.dumps(signature))


def fewer_rows(directory):
    signature = json.loads((directory / "signature.json").read_text())
    signature["features"][0]["rows"] -= 1
    (directory / "signature.json").write_text(json.dumps(signature))


def flipped(directory):
    """Other weights than the noted probabilities are of; finite in every type."""
    rows_of("changed", lambda rows: rows[::-1].copy())(directory)
    dense(lambda kernel: -kernel)(directory)


BAD = {
    "rows out of order": (rows_of("rows", lambda row_M: row_M[::-1].copy()), "no rows in rising order"),
    "a row twice": (rows_of("rows", lambda row_M: np.maximum(row_M, row_M[1])), "no rows in rising order"),
    "a row below": (rows_of("rows", lambda row_M: row_M - 1), "no rows in rising order"),
    "a row beyond": (rows_of("rows", lambda row_M: row_M + 1), "row 11 is outside its table of 11 rows"),
    "fewer values": (rows_of("changed", lambda rows: rows[:-1]), "its rows have"),
    "narrow values": (rows_of("changed", lambda rows: rows[:, :-1]), "its rows have"),
    "another type": (rows_of("changed", lambda rows: rows.astype(np.int64)), "holds int64"),
    "NaN": (dense(lambda kernel: kernel * np.nan), "holds NaN or infinity"),
    "a layer of another size": (dense(lambda kernel: kernel[:-1]), "numbers, not"),
    "a layer that is missing": (without("weights/*kernel.npy"), "lacks weights/"),
    "no probabilities": (without("self_check.npz"), "lacks self_check.npz"),
    "a file of no table": (
        lambda directory: np.save(directory / "tables/other.npy", np.ones(3)),
        "its parent does not",
    ),
    "another schema": (other_schema, "its schema differs"),
    "a smaller table": (fewer_rows, "another table than before, or a smaller one"),
    "other weights": (flipped, "probabilities differ by"),
}


@ONE
@pytest.mark.parametrize("engine", [OneDevice, pytest.param(NativeCpu, **NATIVE)])
@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_a_delta_that_is_wrong_is_refused_in_one_line_and_changes_nothing(chain, spoilt, engine, change, words):
    model, batch = chain[0], random_batch(chain[0], 30, 1)
    servable = Servable(open_version(spoilt, 1), SIZES, make_engine=engine)
    want = servable.predict(batch.dense_BxN, batch.ids_BxK)
    number = again(spoilt, change)
    with pytest.raises(ConfigError, match=words) as error:
        servable.changed_by(open_alone(spoilt, number))()
    assert "\n" not in str(error.value)
    scores = servable.score(*servable.checked(batch.dense_BxN, batch.ids_BxK))
    np.testing.assert_array_equal(scores.probability, want)
    assert scores.version == 1 and model


@ONE
def test_a_delta_names_its_parent_by_number_and_hash(chain, spoilt):
    servable = Servable(open_version(spoilt, 1), SIZES)
    said = json.loads((spoilt / "2" / "manifest.json").read_text())["parent"]
    for parent, words in [
        (said | {"version": 2}, "changes version 2, and 1 is served"),
        (said | {"sha256": "0" * 64}, "changes version 1, and 1 is served by that number, but another"),
    ]:
        number = again(spoilt, lambda directory: None, parent=parent)
        with pytest.raises(ConfigError, match=words):
            servable.changed_by(open_alone(spoilt, number))
    with pytest.raises(ConfigError, match="the hash of its manifest differs"):
        open_version(spoilt, number)
    for parent in ({"version": 9, "sha256": ""}, {"version": 0, "sha256": ""}, {"version": "1", "sha256": ""}, 3, None):
        number = again(spoilt, lambda directory: None, parent=parent)
        with pytest.raises(ConfigError, match=r"none before it|is not a manifest"):
            open_version(spoilt, number)
    path = next((spoilt / "1" / "tables").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"changes version 1: .* has \d+ bytes"):
        open_version(spoilt, 2)


@ONE
def test_what_only_a_whole_version_can_say_is_refused(chain, spoilt):
    model = chain[0]
    parent = open_version(spoilt, 2)
    other = tiny_model(bottom_mlp=(6, 4), learned_pooling=model.learned_pooling)
    with pytest.raises(ConfigError, match=r"another model .*bottom_mlp.*export a whole version"):
        export_change(spoilt, parent, other, lively_state(other))
    assert sorted(path.name for path in spoilt.iterdir()) == ["1", "2"]


def come(source, live, number):
    """A version appears as an export makes it: at once, and as a whole."""
    come_as(source / str(number), live / str(number))


def come_as(source, version):
    shutil.copytree(source, version.parent.parent / "copy")
    os.rename(version.parent.parent / "copy", version)


@ONE
def test_a_server_follows_deltas_and_after_a_bad_one_waits_for_a_whole_version(chain, tmp_path, caplog):
    """A missing parent, a changed file, one out of order; a delta that is mended is taken, and all behind it."""
    model, deltas, whole = chain
    live = tmp_path / "live"
    live.mkdir()
    come(deltas, live, 1)
    come(deltas, live, 3)

    loaded: list[int] = []

    def loads(version, like):
        loaded.append(version.number)
        return Servable(version, SIZES, like=like)

    async def follow():
        async with Following(live, loads) as following:
            repository, weights = following.repository, following.repository.current.weights
            assert "changes version 2: " in repository.refused[3] and "has no version 2" in repository.refused[3]
            come(deltas, live, 2)
            await following.serves(3)
            assert repository.current.weights is weights and loaded == [1], "a second copy was made"
            assert not repository.refused
            state = lively_state(model, 1)
            export_state(live, model, state, open_version(whole).manifest["tables"])
            await following.serves(4)
            assert loaded == [1, 4]
            changed = export_change(live, open_version(live, 4), model, learned(state, model, MOVED[0], 1.0))
            await following.serves(5)
            come_as(changed.directory, live / "6")
            await following.until(lambda: 6 in repository.refused)
            assert repository.refused[6] == "it changes version 4, and 5 is served: a whole version is waited for"
            aside = shutil.copytree(live, tmp_path / "aside")
            path = export_change(aside, changed, model, learned(state, model, MOVED[1], 1.0)).directory
            (path / "signature.json").write_bytes((path / "signature.json").read_bytes() + b" ")
            os.rename(path, live / "7")
            await following.until(lambda: 7 in repository.refused)
            assert repository.current.version.number == 5
            export_state(live, model, state, open_version(whole).manifest["tables"])
            await following.serves(8)

    asyncio.run(follow())


@ONE
def test_no_request_is_dropped_or_scored_by_a_mixture_while_deltas_come(chain, tmp_path):
    """Every answer is 200, names a version, and is to the bit what that version scores offline."""
    model, deltas, _ = chain
    live, batch = tmp_path / "live", random_batch(model, 1, 1)
    live.mkdir()
    shutil.copytree(deltas / "1", live / "1")
    want = {n: load(deltas, n, (1,)).predict(batch.dense_BxN, batch.ids_BxK).item() for n in (1, 2, 3)}
    tensors = [("dense", "FP32", batch.dense_BxN), ("ids", "INT32", batch.ids_BxK)]
    inputs = [{"name": n, "datatype": t, "shape": list(x.shape), "data": x.ravel().tolist()} for n, t, x in tensors]
    answers: list[tuple[int, str, float]] = []
    done = threading.Event()

    def ask(server):
        while not done.is_set():
            status, _, said = server.ask("POST", "/v2/models/tiny/infer", {"inputs": inputs})
            answers.append((status, said.get("model_version"), said["outputs"][0]["data"][0] if status == 200 else 0.0))

    with running(live, "--batch_sizes=1", "--poll_seconds=0.02") as server:
        clients = [threading.Thread(target=ask, args=(server,)) for _ in range(3)]
        for client in clients:
            client.start()
        for number in (2, 3):
            come(deltas, live, number)
            event = server.event("model_ready", version=number)
            assert event["pause_ms"] > 0
            until(lambda number=number: any(answer[1] == str(number) for answer in answers))
        done.set()
        for client in clients:
            client.join()
        status = server.ask("GET", "/status.json")[2]
        assert status["model"]["version"] == 3 and not status["refused"]
        assert server.ask("GET", "/v2/models/tiny")[2]["versions"] == ["3"]
        assert server.ask("POST", "/v2/models/tiny/versions/2/infer", {"inputs": inputs})[0] == 404
        assert b"dlrm_model_version 3.0" in server.ask("GET", "/metrics")[2]
    assert {status for status, *_ in answers} == {200}
    assert {version for _, version, _ in answers} == {"1", "2", "3"}
    assert all(np.float32(value) == np.float32(want[int(version)]) for _, version, value in answers)


def test_freshness_is_counted_from_an_update_to_the_first_score_by_it(monkeypatch):
    telemetry = Telemetry()
    monkeypatch.setattr(time, "time", lambda: 100.0)
    telemetry.loaded(2, {"first": 90.0, "last": 98.5})
    telemetry.batch(1, 1)  # By the version before.
    assert not telemetry.freshness
    telemetry.batch(1, 2)
    assert telemetry.freshness == {"first": 10.0, "last": 1.5}
    monkeypatch.setattr(time, "time", lambda: 200.0)
    telemetry.batch(1, 2)
    assert telemetry.freshness == {"first": 10.0, "last": 1.5}
    assert b'dlrm_freshness_seconds{update="last"} 1.5' in telemetry.exposition()
    for said in (None, {}, {"first": 1.0}, {"first": "x", "last": 1.0}, [1.0, 2.0]):
        assert _updated({"updated": said}) == {}
