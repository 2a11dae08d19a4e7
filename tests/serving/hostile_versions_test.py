"""Versions that lie, in any file: each is refused in one line, and neither it nor a pipe holds up the one before."""

import asyncio
import json
import os
import re
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from jax import export as jax_export

from dlrm_jax.config import ConfigError
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact import program
from dlrm_jax.serving.artifact.export import export_program
from dlrm_jax.serving.artifact.loaded import OneDevice, Servable
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.program import Program, require_read_apart
from dlrm_jax.serving.artifact.store import Version, newest_whole, open_version, write_version
from dlrm_jax.serving.artifact.weights import read_weights
from dlrm_jax.serving.http import repository
from dlrm_jax.training.options import ShardingOptions
from tests.following import Following
from tests.helpers import random_batch, tiny_model
from tests.server_process import RunningServer, running
from tests.serving_helpers import export_tiny
from tests.tables.native_test import needs_compiler

SEVERAL = engine_maker(ShardingOptions(mesh="model:2"), 16)
ENGINES = [OneDevice, SEVERAL, pytest.param(NativeCpu, marks=needs_compiler)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, exported once."""
    model_dir = tmp_path_factory.mktemp("exported")
    export_tiny(model_dir, tiny_model())
    return model_dir


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(exported, tmp_path / "model")


def next_version(model_dir, change) -> Version:
    """The first version once more with what `change` does to its files, hashed anew: only what it says is wrong."""

    def write(directory):
        ignored = shutil.ignore_patterns("manifest.json")
        shutil.copytree(model_dir / "1", directory, dirs_exist_ok=True, ignore=ignored)
        change(directory)

    return write_version(model_dir, write, {})


def says(name, *path, value):
    """A change of one value of a JSON file; without `value` it is left out."""

    def change(directory):
        content = json.loads((directory / name).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (directory / name).write_text(json.dumps(content))

    return change


def other_array(directory):
    path = next((directory / "tables").glob("*user.npy"))
    np.save(path, np.load(path)[:-1])


LIES = {
    "negative rows": (says("signature.json", "features", 0, "rows", value=-5), "rows is -5"),
    "rows in words": (says("signature.json", "features", 0, "rows", value="x"), "rows is 'x'"),
    "other rows": (says("signature.json", "features", 0, "rows", value=4), "are not of one model"),
    "wide": (says("signature.json", "embedding_dim", value=65536), "are not of one model"),
    "no kind": (says("signature.json", "kind", value="int2"), "kind is 'int2'"),
    "no list": (says("signature.json", "features", value=3), "is not a model's"),
    "a deep file": (lambda directory: (directory / "signature.json").write_text("[" * 10**5), "is not a whole file"),
    "an outside file": (says("weights.json", "bottom_mlp/layer_0/bias", "files", value=["../x"]), "is not in the man"),
    "a short table": (other_array, r"has \[10, 4\] float32, not the \[11, 4\] float32"),
    "no array": (lambda directory: next((directory / "weights").glob("*")).write_bytes(b"x" * 200), "is not an array"),
}


@pytest.mark.parametrize(("change", "words"), LIES.values(), ids=LIES.keys())
def test_what_no_export_writes_is_refused_in_one_line(copied, change, words):
    next_version(copied, change)
    with pytest.raises(ConfigError, match=words) as error:
        load(copied, 2, (1,)).warm_up()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", [SEVERAL, pytest.param(NativeCpu, marks=needs_compiler)])
@pytest.mark.parametrize(
    "change",
    [
        says("model.json", "model", "tables", 0, "embedding_dim", value=65536),
        says("model.json", "model", "features", 0, "hotness", value=3),
        says("model.json", "model", "features", 0, "hotness", value="x"),
        says("model.json", "model", "num_dense", value=300),
        says("model.json", "loss_threshold", value=7),
        says("model.json", "model", value=3),
    ],
)
def test_a_model_of_other_sizes_is_refused(copied, change, engine):
    next_version(copied, change)
    with pytest.raises(ConfigError, match=r"model\.json"):
        load(copied, 2, make_engine=engine)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        says("model.json", "model", "interaction", value="cross"),
        says("model.json", "model", "interaction", "options", value={"self_interaction": True}),
        says("model.json", "model", "learned_pooling", value=True),
        lambda directory: [
            np.save(p, np.load(p).astype(np.float64)) for p in (directory / "weights").glob("*_kernel.npy")
        ],
        lambda directory: [np.save(p, np.load(p)[:-1]) for p in (directory / "weights").glob("*_kernel.npy")],
        lambda directory: [np.save(p, np.load(p)[:-1]) for p in (directory / "weights").glob("*_bias.npy")],
    ],
)
def test_weights_of_other_sizes_do_not_reach_the_c_code(copied, change):
    next_version(copied, change)
    with pytest.raises(ConfigError):
        load(copied, 2, make_engine=NativeCpu)


@pytest.mark.parametrize("name", ["program.stablehlo", "signature.json", "weights.json", "self_check.npz"])
def test_a_file_that_the_manifest_leaves_out_is_not_read(copied, name):
    path = copied / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=f"{name} is not in the manifest"):
        load(copied).self_check()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", "signature.json", "metrics.json"])
def test_a_pipe_is_no_file(copied, name):
    next_version(copied, lambda directory: None)
    (copied / "2" / name).unlink()
    os.mkfifo(copied / "2" / name)
    version, refused = newest_whole(copied)
    assert version.number == 1 and re.search("not a regular file|is missing", refused[2])


@pytest.mark.parametrize("engine", ENGINES)
def test_files_that_are_cut_or_overwritten_change_no_score(copied, engine):
    batch = random_batch(tiny_model(), 16)
    servable = load(copied, batch_sizes=(16,), make_engine=engine)
    want = servable.predict(batch.dense_BxN, batch.ids_BxK)
    for path in (copied / "1").rglob("*.npy"):
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
        np.testing.assert_array_equal(servable.predict(batch.dense_BxN, batch.ids_BxK), want)
        os.truncate(path, 10)
    np.testing.assert_array_equal(servable.predict(batch.dense_BxN, batch.ids_BxK), want)
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if str(copied) in line]


def test_what_changes_while_it_is_read_is_refused(copied):
    version = open_version(copied)

    def engine(version, like):
        read = OneDevice(version, like)
        path = next((copied / "1" / "tables").iterdir())
        path.write_bytes(path.read_bytes())
        return read

    with pytest.raises(ConfigError, match="was changed while it was read"):
        Servable(version, (1,), make_engine=engine)


def test_a_program_that_calls_functions_of_the_process_is_refused():
    weights = {"w": jax.ShapeDtypeStruct((3, 3), np.float32)}

    def forward(weights, dense_BxN, ids_BxK):
        return jax.lax.linalg.qr(weights["w"])[0].sum() + dense_BxN[:, 0], ids_BxK[:, 0]

    dense, ids = jax.ShapeDtypeStruct((2, 3), np.float32), jax.ShapeDtypeStruct((2, 1), np.int32)
    off = [jax_export.DisabledSafetyCheck.custom_call(name) for name in ("lapack_sgeqrf_ffi", "lapack_sorgqr_ffi")]
    exported = jax_export.export(jax.jit(forward), disabled_checks=off)(weights, dense, ids)
    with pytest.raises(ConfigError, match=r"program\.stablehlo has 'custom_call @\w+', which no export contains"):
        Program(bytes(exported.serialize()))


def test_a_program_is_read_by_another_process_first_and_once(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = (copied / "1" / "program.stablehlo").read_bytes()
    require_read_apart(whole)
    with pytest.raises(ConfigError, match=r"^program\.stablehlo cannot be read: .*export anew$"):
        require_read_apart(whole[:-200])
    monkeypatch.setattr(program, "_READER", "import os; os.abort()")
    require_read_apart(whole)
    with pytest.raises(ConfigError, match=r"^program\.stablehlo ends who reads it \(signal 6\); export anew$"):
        require_read_apart(whole[:-200])
    monkeypatch.setattr(program, "_READER", "1 / 0")
    with pytest.raises(ConfigError, match=r"was not read: ZeroDivisionError: division by zero; export anew$"):
        require_read_apart(whole[:-200])
    monkeypatch.setattr(program, "_READER", "while True: pass")
    monkeypatch.setattr(program, "_READ_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"was not read in 0 s; export anew$"):
        require_read_apart(whole[:-200])


def assert_refused_and_the_next_taken(model_dir, change, reason: str):
    """A running server says why it does not take the version that `change` spoils, takes a good one, and ends well."""
    with running(model_dir, "--batch_sizes=1", "--poll_seconds=0.1") as server:
        next_version(model_dir, change)
        assert reason in server.event("reload_refused", version=2)["reason"]
        next_version(model_dir, lambda directory: None)
        server.event("model_ready", version=3)
        assert server.stop() == 0


@pytest.mark.end_to_end
def test_a_program_that_ends_who_reads_it_ends_no_server(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reader = "import os, sys; sys.stdin.buffer.read().endswith(b'forged') and os.abort()"
    start = "import sys; sys.argv[0] = 'serve'; from dlrm_jax import serve;"
    start += f"from dlrm_jax.serving.artifact import program; program._READER = {reader!r}; serve.command()"
    monkeypatch.setattr(RunningServer, "START", ("-c", start))

    def forge(directory):
        with (directory / "program.stablehlo").open("ab") as file:
            file.write(b"forged")  # Which MLIR does not look at.

    assert_refused_and_the_next_taken(copied, forge, "ends who reads it (signal 6)")


@pytest.mark.end_to_end
def test_a_program_that_never_ends_holds_up_neither_a_later_version_nor_the_end(copied, monkeypatch):
    def endless(directory):
        def forward(weights, dense_BxN, ids_BxK):
            total = jax.lax.while_loop(lambda x: x > -1, lambda x: (x + 1) % 7, ids_BxK.max() * 0)
            return dense_BxN[:, 0] + total, dense_BxN[:, 0]

        model = tiny_model()
        shapes = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in read_weights(open_version(copied)).items()
        }
        endless = export_program(forward, shapes, model.num_dense, model.num_slots)
        (directory / "program.stablehlo").write_bytes(endless)

    start = (
        "import sys; sys.argv[0] = 'serve'; from dlrm_jax import serve; from dlrm_jax.serving.http import repository;"
    )
    start += "repository._seconds_for = lambda state: 10 if any('/model/2/' in name for name, *_ in state) else 300;"
    start += "serve.command()"
    monkeypatch.setattr(RunningServer, "START", ("-c", start))
    assert_refused_and_the_next_taken(copied, endless, "was not ready after 10 s")


def test_a_version_that_never_gets_ready_blocks_none_after_it(copied, monkeypatch):
    never = threading.Event()

    def load(version, like):
        servable = Servable(version, (1,), like=like)
        return servable if version.number != 2 else never.wait()

    async def follow():
        async with Following(copied, load) as following:
            monkeypatch.setattr(repository, "_LOAD_SECONDS", 1.0)
            next_version(copied, lambda directory: None)
            await following.until(lambda: 2 in following.repository.refused)
            assert "was not ready after 1 s" in following.repository.refused[2]
            monkeypatch.setattr(repository, "_LOAD_SECONDS", 60.0)
            next_version(copied, lambda directory: None)
            await following.until(lambda: following.repository.current.version.number == 3)

    asyncio.run(follow())
    assert not never.is_set()


def test_a_directory_that_cannot_be_listed_is_looked_at_again(copied, monkeypatch):
    found, tries = repository.versions, []

    def versions(model_dir):
        # Who lists a disk that answers slowly, or thousands of files, keeps no client waiting.
        tries.append(threading.current_thread() is not threading.main_thread())
        if len(tries) < 3:
            raise OSError(24, "Too many open files")
        return found(model_dir)

    async def follow():
        monkeypatch.setattr(repository, "versions", versions)
        async with Following(copied, lambda version, like: Servable(version, (1,), like=like)) as following:
            next_version(copied, lambda directory: None)
            await following.until(lambda: following.repository.current.version.number == 2)

    asyncio.run(follow())
    assert len(tries) >= 3 and all(tries)


def test_an_end_that_comes_just_behind_a_look_is_not_lost(copied, monkeypatch):
    looks, go = [], threading.Event()

    def versions(model_dir):
        looks.append(model_dir)
        go.wait()
        return []

    async def follow():
        monkeypatch.setattr(repository, "versions", versions)
        async with Following(copied, lambda version, like: Servable(version, (1,), like=like)) as following:
            await following.until(lambda: looks)
            go.set()
            time.sleep(0.05)  # Meanwhile the thread hands over what it found, to the loop's next turn.
            stopping = asyncio.create_task(following.repository.stop())  # In the same turn, behind it.
            await following.until(lambda: stopping.done() or len(looks) > 1)
            assert stopping.done(), "it looks again instead of ending"

    asyncio.run(follow())
    assert len(looks) == 1
