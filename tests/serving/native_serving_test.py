"""An exported model scored by C++: the exported program's scores, and a row's same bits in whatever batch it comes."""

import concurrent.futures
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dlrm_jax.config import ConfigError, FeatureConfig, HiddenConfig, LossConfig, TableConfig
from dlrm_jax.host.cores import cores
from dlrm_jax.serving.artifact.export import by_the_program, export_model, of_arrays
from dlrm_jax.serving.artifact.loaded import OneDevice, load
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.store import open_version
from dlrm_jax.tables.by_name import named_tables
from tests.forked import run
from tests.helpers import ROOT, random_batch, tiny_model
from tests.server_process import running
from tests.serving_helpers import export_tiny, lively_state, random_dataset
from tests.tables.native_test import needs_compiler

# As wide as needs several panels of weights, and vectors of a width that fills no register, or two.
WIDE = {"bottom_mlp": (70, 4), "top_mlp": (300, 90, 1)}
# As takes long enough for several threads to share a batch of a hundred rows.
LONG = {"bottom_mlp": (70, 4), "top_mlp": (1200, 800, 1)}
MANY = {
    "tables": tuple(TableConfig(f"t{i}", 9, 20) for i in range(40)),
    "features": tuple(FeatureConfig(f"f{i}", f"t{i}") for i in range(40)),
    "bottom_mlp": (33, 20),
}
MEANS = tuple(FeatureConfig(name, "item", hotness, "mean") for name, hotness in (("few", 2), ("many", 5), ("one", 1)))
ONE = (FeatureConfig("f", "t", hotness=40),)
NO_NUMBERS = {"num_dense": 0, "bottom_mlp": ()}
MODELS = {
    "dot": ("float32", {}),
    "self interaction": ("float32", {"self_interaction": True, **WIDE}),
    "many features": ("float32", MANY),
    "means": ("float32", {"tables": (TableConfig("item", 7, 4),), "features": MEANS}),
    "learned": ("float32", {"learned_pooling": True}),
    "learned means": ("int8", {"learned_pooling": True, "tables": (TableConfig("item", 7, 4),), "features": MEANS}),
    "one feature, one number": ("float32", {"tables": (TableConfig("t", 3, 1),), "features": ONE, "bottom_mlp": (1,)}),
    "cross": ("float32", {"interaction": "cross", "cross_layers": 2, "cross_rank": 3}),
    "wide cross": ("bfloat16", {"interaction": "cross", "cross_layers": 1, "cross_rank": 40, **WIDE}),
    "cat": ("int8", {"interaction": "cat", **WIDE}),
    "full cross": ("float32", {"interaction": "full_cross", "cross_layers": 2}),
    "beside a tower": (
        "float32",
        {"interaction": "parallel_cross", "cross_layers": 1, "cross_rank": 3, "tower_mlp": (70, 5), **WIDE},
    ),
    "dot, no numbers": ("float32", {**NO_NUMBERS, "self_interaction": True}),
    "published DLRM": (
        "float32",
        {**NO_NUMBERS, "interaction": "cat", "top_hidden": HiddenConfig("relu", "batch", 0.4), "top_mlp": (70, 9, 1)},
    ),
    "published DCNv2": (
        "float32",
        {**NO_NUMBERS, "interaction": "parallel_full_cross", "cross_layers": 2, "tower_mlp": (70, 9), "top_mlp": (1,)}
        | {"top_hidden": HiddenConfig("relu", "batch", 0.4)},
    ),
    "numbers embedded": ("int8", {"embed_numbers": True, "self_interaction": True, **WIDE}),
    "a number embedded": ("float32", {"embedded_columns": (2,)}),
    "numbers embedded, no bottom MLP": (
        "float32",
        {"embed_numbers": True, "bottom_mlp": (), "interaction": "cross", "cross_layers": 1, "cross_rank": 3},
    ),
    "bfloat16": ("bfloat16", {}),
    "int8": ("int8", MANY),
    "int4": ("int4", {}),
    "batch norm, gelu": (
        "float32",
        {"interaction": "cross", "cross_layers": 1, "cross_rank": 3, **WIDE}
        | {"bottom_hidden": HiddenConfig("gelu", "batch"), "top_hidden": HiddenConfig("silu", "batch", 0.5)},
    ),
    "layer norm, prelu": (
        "float32",
        {**WIDE, "bottom_hidden": HiddenConfig("prelu", "layer"), "top_hidden": HiddenConfig("relu", "layer")},
    ),
    "int4, odd": (
        "int4",
        {"tables": tuple(TableConfig(n, 8, 5) for n in ("user", "item", "flag")), "bottom_mlp": (5,)},
    ),
}


ALIKE = {"self interaction", "means", "cat", "beside a tower", "numbers embedded", "bfloat16", "int4"}
"""What others cover part by part."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, exported once."""
    model_dir = tmp_path_factory.mktemp("exported")
    export_tiny(model_dir, tiny_model(**LONG))
    return model_dir


def scores(engine, batch, rows=slice(None)):
    """(probability and logit, rows) of an engine."""
    return np.array(engine.run(batch.dense_BxN[rows], batch.ids_BxK[rows]))


def export_random(model_dir, model, kind, make_score=by_the_program, evaluated=()):
    """Export a model none of whose weights is a zero or a one that training would begin with."""
    rng = np.random.default_rng(0)
    draw = lambda array: rng.normal(size=array.shape).astype(np.float32)  # noqa: E731
    state = lively_state(model)
    tables = {name: draw(rows) for name, rows in named_tables(model, state.tables)}
    dense_params = jax.tree.map(
        lambda array: draw(array) / (len(array) if array.ndim == 2 else 1) ** 0.5, state.dense_params
    )
    parts = (dense_params, of_arrays(tables), random_dataset(model), kind)
    more = {"evaluated": evaluated, "batch_stats": state.batch_stats, "make_score": make_score}
    return export_model(model_dir, model, LossConfig(), *parts, **more)


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "changes"),
    [pytest.param(*model, marks=[pytest.mark.exhaustive] * (name in ALIKE)) for name, model in MODELS.items()],
    ids=MODELS.keys(),
)
@pytest.mark.sample(3)
def test_scores_are_those_of_the_exported_program(tmp_path, kind, changes):
    model = tiny_model(**changes)
    version = export_random(tmp_path, model, kind)
    ours, plain = NativeCpu(version), OneDevice(version)
    for rows in (1, 40):
        batch = random_batch(model, rows, seed=rows)
        got, want = scores(ours, batch), scores(plain, batch)
        assert got.shape == (2, rows) and (rows == 1 or np.ptp(want[1]) > 0.1)
        np.testing.assert_allclose(got[0], want[0], atol=1e-6)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.sample(1)
def test_a_row_has_the_same_bits_in_every_batch(tmp_path, kind):
    model = tiny_model(**WIDE)
    engine, batch = NativeCpu(export_tiny(tmp_path, model, kind), threads=1), random_batch(model, 101)
    whole = scores(engine, batch)
    for rows in (1, 2, 3, 6, 7, 8, 9, 47, 48, 49, 100):
        np.testing.assert_array_equal(scores(engine, batch, slice(rows)), whole[:, :rows])
        np.testing.assert_array_equal(scores(engine, batch, slice(101 - rows, 101)), whole[:, 101 - rows :])


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits(exported):
    batch = random_batch(tiny_model(**LONG), 200)
    whole = scores(NativeCpu(open_version(exported), threads=1), batch)
    for threads in (2, 5):
        engine = NativeCpu(open_version(exported), threads=threads)
        for rows in (13, 64, 200) * 10:
            np.testing.assert_array_equal(scores(engine, batch, slice(rows)), whole[:, :rows])


@needs_compiler
def test_callers_at_once_get_their_own_scores(exported):
    engine = NativeCpu(open_version(exported), threads=3)
    batch = random_batch(tiny_model(**LONG), 300)
    whole = scores(engine, batch)
    parts = [slice(first, first + 1 + first % 60) for first in range(0, 240, 3)] * 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for part, got in zip(parts, pool.map(lambda part: scores(engine, batch, part), parts), strict=True):
            np.testing.assert_array_equal(got, whole[:, part])


@needs_compiler
def test_a_batch_is_not_filled_up(exported, monkeypatch):
    servable = load(exported, batch_sizes=(8, 32), make_engine=NativeCpu)
    batch = random_batch(tiny_model(**LONG), 50)
    seen, scored = [], servable._engine.run
    monkeypatch.setattr(servable._engine, "run", lambda *inputs: seen.append(len(inputs[0])) or scored(*inputs))
    np.testing.assert_allclose(
        servable.predict(batch.dense_BxN, batch.ids_BxK),
        load(exported).predict(batch.dense_BxN, batch.ids_BxK),
        atol=1e-6,
    )
    assert seen == [32, 18]


@needs_compiler
def test_probabilities_keep_their_threshold_and_what_is_not_a_number_stays_none(tmp_path):
    model = tiny_model()
    version = export_tiny(tmp_path, model, loss=LossConfig(threshold=0.3))
    batch = random_batch(model, 30)
    probability, _ = scores(NativeCpu(version), batch)
    np.testing.assert_allclose(probability, scores(OneDevice(version), batch)[0], atol=1e-6)
    assert probability.min() == np.float32(0.3)
    batch.dense_BxN[7, 1] = np.nan
    got, want = scores(NativeCpu(version), batch), scores(OneDevice(version), batch)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(got[:, 7]).all() and np.isnan(got).sum() == 2


@needs_compiler
@pytest.mark.parametrize("changes", [{}, {"tables": (TableConfig("item", 7, 4),), "features": MEANS}])
def test_an_id_outside_its_table_is_an_empty_slot(tmp_path, changes):
    """The server refuses it; the C++ must not read another's memory whoever asks."""
    model = tiny_model(**changes)
    engine, batch = NativeCpu(export_tiny(tmp_path, model)), random_batch(model, 6)
    rows = model.table(model.features[0].table).num_embeddings
    empty = batch.ids_BxK.copy()
    empty[:, 0] = -1
    for outside in (rows, 2**31 - 1, -2, -(2**31)):
        batch.ids_BxK[:, 0] = outside
        np.testing.assert_array_equal(scores(engine, batch), np.array(engine.run(batch.dense_BxN, empty)))


@needs_compiler
def test_what_would_be_read_beyond_its_end_is_refused(exported):
    engine, batch = NativeCpu(open_version(exported)), random_batch(tiny_model(**LONG), 6)
    dense, ids = batch.dense_BxN, batch.ids_BxK
    for wrong in ((dense, ids[:5]), (dense[:5], ids), (dense[:, :2], ids), (dense, ids[:, :2])):
        with pytest.raises(TypeError, match="expected"):
            engine.run(*wrong)
    with pytest.raises(TypeError, match=r"ids: int64\[6, 7\]; expected int32\[6, 7\]"):
        engine.run(dense, ids.astype(np.int64))
    unaligned = np.frombuffer(b"." + ids.tobytes(), np.uint8)[1:].view(np.int32).reshape(ids.shape)
    for same in ((np.asfortranarray(dense), ids[:, ::-1][:, ::-1]), (dense, unaligned)):
        np.testing.assert_array_equal(np.array(engine.run(*same)), scores(engine, batch))
    assert np.array(engine.run(dense[:0], ids[:0])).shape == (2, 0)


def in_a_process(code, model_dir):
    """Run `code`, which may end its process, in one of its own."""
    start = "import os, signal, sys, threading, warnings\nfrom dlrm_jax.serving.artifact.loaded import load\n"
    start += (
        "from dlrm_jax.serving.artifact.native import NativeCpu\nfrom tests.helpers import random_batch, tiny_model\n"
    )
    start += "from tests.serving.native_serving_test import LONG\nbatch = random_batch(tiny_model(**LONG), 200)\n"
    start += "make = lambda version, like: NativeCpu(version, threads=3)\n"
    start += f"model = load({str(model_dir)!r}, make_engine=make)\n"
    start += "score = lambda: model.predict(batch.dense_BxN, batch.ids_BxK)\n"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", start + code], cwd=ROOT, check=True, env=environment)


@needs_compiler
def test_a_forked_process_scores(exported):
    """Also where a thread of its parent, which it does not have, held a lock."""
    in_a_process(
        "want = score()\n"
        "threading.Thread(target=lambda: [score() for _ in iter(int, 1)], daemon=True).start()\n"
        "warnings.simplefilter('ignore')\n"
        "for _ in range(40):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        signal.alarm(20)\n"  # Ends a child that waits for a lock for ever.
        "        os._exit(0 if (score() == want).all() else 1)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "os._exit(0)\n",
        exported,
    )


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted, and forbidden, as Linux does")
def test_threads_help_and_without_any_the_caller_does_all(exported):
    count = "len(os.listdir('/proc/self/task'))"
    in_a_process(f"before = {count}\nwant = score()\nassert {count} == before + 2, (before, {count})\n", exported)
    in_a_process(
        "import resource\n"
        "alone = lambda version, like: NativeCpu(version, threads=1)\n"
        "one = load(model.version.directory.parent, make_engine=alone)\n"
        "want = one.predict(batch.dense_BxN, batch.ids_BxK)\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"  # The limit does not hold for root.
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        f"before = {count}\n"
        "for _ in range(20):\n    assert (score() == want).all()\n"
        f"assert {count} == before, 'threads started all the same'\n",
        exported,
    )


@pytest.mark.parametrize(
    ("said", "counted"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("none", 64), (None, 64)]
)
def test_cores_are_those_of_the_machine_and_of_the_containers_share(tmp_path, monkeypatch, said, counted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    if said is not None:
        (tmp_path / "cpu.max").write_text(said)
    assert cores(tmp_path / "cpu.max") == counted


@needs_compiler
def test_what_native_does_not_have_is_refused(tmp_path, monkeypatch):
    version = export_tiny(tmp_path, tiny_model(compute_dtype="bfloat16"))
    with pytest.raises(ConfigError, match="--kernels=native computes in float32, this model in bfloat16"):
        NativeCpu(version)
    version = export_tiny(tmp_path, tiny_model())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="--kernels=native is for CPUs; this process uses a gpu"):
        NativeCpu(version)


@needs_compiler
def test_it_needs_no_training_code(exported):
    script = (
        "import sys, dlrm_jax.serving\n"
        "from dlrm_jax.serving.artifact.native import NativeCpu\n"
        f"model = dlrm_jax.serving.load({str(exported)!r}, make_engine=NativeCpu)\n"
        "assert model.self_check() < 1e-6\n"
        "heavy = {'flax', 'optax', 'orbax', 'tensorflow_datasets', 'pyarrow', 'absl', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, env=environment)


@needs_compiler
@pytest.mark.end_to_end
def test_the_command_serves_the_same_bits_in_any_batch(exported):
    batch = random_batch(tiny_model(**LONG), 20)
    want = load(exported, make_engine=NativeCpu).predict(batch.dense_BxN, batch.ids_BxK)
    with running(exported, "--kernels=native") as server:
        for rows in (20, 3, 1):
            values = (("dense", "FP32", batch.dense_BxN[:rows]), ("ids", "INT32", batch.ids_BxK[:rows]))
            inputs = [{"name": n, "datatype": t, "shape": v.shape, "data": v.ravel().tolist()} for n, t, v in values]
            status, _, answer = server.ask("POST", "/v2/models/tiny/infer", {"inputs": inputs})
            outputs = {output["name"]: output["data"] for output in answer["outputs"]}
            assert status == 200
            np.testing.assert_array_equal(np.array(outputs["probability"], np.float32), want[:rows])
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("compiler", "flags", "said"),
    [
        ("g++", ["--mesh=model:2"], "--kernels=native scores on one device: leave it or --mesh out"),
        ("false", [], "could not compile score.cc"),
    ],
)
def test_a_mistake_is_one_line(exported, tmp_path, monkeypatch, compiler, flags, said):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    finished = run("serve", f"--model={exported}", "--port=0", "--kernels=native", *flags)
    assert finished.returncode == 1 and said in finished.stderr and "Traceback" not in finished.stderr
