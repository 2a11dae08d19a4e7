"""Each value of each JSON file of a version, and each array of its self-check, as others could be: never believed."""

import copy
import json
import shutil

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.loaded import Program, Servable
from dlrm_jax.serving.artifact.store import Version, open_version
from tests.serving.transform_test import prepared, without_label  # noqa: F401

LEFT_OUT = object()
OTHERS = [None, -5, 10**400, float("nan"), "x", [[1]], {"a": 1}, LEFT_OUT]


@pytest.fixture(scope="module")
def exported(prepared, tmp_path_factory):  # noqa: F811
    """(rows of the log, a directory of versions to be spoilt, its Servable)."""
    rows, _, model_dir, *_ = prepared
    copied = shutil.copytree(model_dir, tmp_path_factory.mktemp("copied") / "model")
    return without_label(rows), copied, Servable(open_version(copied), (16,))


def places(value, path=()):
    """Paths to the values in a JSON value; of a list, the first two."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def with_other(content, path, other):
    content = inner = copy.deepcopy(content)
    for key in path[:-1]:
        inner = inner[key]
    if other is LEFT_OUT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = other
    return content


@pytest.mark.parametrize("name", ["signature.json", "model.json", "weights.json", "vocabularies.json"])
@pytest.mark.sample(2)
def test_a_value_of_another_kind_is_refused_in_one_line_or_changes_nothing_that_fails(exported, name, monkeypatch):
    rows, model_dir, whole = exported
    contents = {}
    monkeypatch.setattr(Version, "read_json", lambda version, name: contents[name])
    for path in (model_dir / "1").glob("*.json"):
        contents[path.name] = json.loads(path.read_text())
    version, good, refused, tried = Version(1, model_dir / "1", {}), contents[name], 0, 0
    for path in places(good):
        for other in OTHERS:
            contents[name] = with_other(good, path, other)
            tried += 1
            try:
                Servable(version, (16,), make_engine=lambda version, like: whole._engine).reader.read(rows[:2])
            except (ConfigError, BadRequest) as error:
                refused += 1
                assert "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{name}: {path} = {other!r:.30}") from error
    assert refused > 0.8 * tried > 50


@pytest.mark.parametrize(
    ("name", "path", "other", "words"),
    [
        ("signature.json", ("dense_statistics", "standard", "mean"), LEFT_OUT, "'standard' are no counted ones"),
        ("signature.json", ("dense_statistics", "standard", "mean"), float("nan"), "'standard' are no counted ones"),
        ("signature.json", ("dense_statistics", "standard", "count"), -5, "'standard' are no counted ones"),
        ("signature.json", ("bucket_edges", "quarter"), [3.0, 2.0, 4.0], "edges of 'quarter' do not rise"),
        ("signature.json", ("bucket_edges", "quarter"), [1.0, float("nan")], "edges of 'quarter' do not rise"),
        ("vocabularies.json", ("colour", 1), LEFT_OUT, "is not of its inputs"),
        ("vocabularies.json", ("colour", 0), LEFT_OUT, "is not of its inputs"),
    ],
)
def test_numbers_that_training_did_not_write_are_refused(exported, name, path, other, words, monkeypatch):
    _, model_dir, whole = exported
    read = Version.read_json

    def changed(version, of):
        content = read(version, of)
        return with_other(content, path, other) if of == name else content

    monkeypatch.setattr(Version, "read_json", changed)
    with pytest.raises(ConfigError, match=words):
        Servable(Version(1, model_dir / "1", {}), (16,), make_engine=lambda version, like: whole._engine)


def spoilt(directory, **arrays):
    path = directory / "self_check.npz"
    with np.load(path) as noted:
        np.savez(path, **{name: value for name, value in ({**noted} | arrays).items() if value is not None})


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"ids": np.full((16, 19), 2**31 - 1)}, "id 2147483647 is outside table"),
        ({"ids": np.zeros((16, 3), np.int32)}, r"ids has shape \[16, 3\]"),
        ({"dense": np.full((16, 6), np.nan)}, "nan is not a finite float32"),
        ({"probability": None}, "probability is not a file"),
        ({"probability": np.zeros((16, 2))}, "it has not a probability for each row"),
        ({"probability": np.array(["x"] * 16)}, "could not convert"),
        ({"probability": np.full(16, np.nan)}, "probabilities differ by nan"),
        ({"dense": np.zeros((0, 6)), "ids": np.zeros((0, 19), int), "probability": np.zeros(0)}, "it has not a prob"),
    ],
)
def test_a_self_check_that_checks_nothing_is_refused(exported, tmp_path, arrays, words):
    _, model_dir, whole = exported
    directory = shutil.copytree(model_dir / "1", tmp_path / "1")
    spoilt(directory, **arrays)
    version = Version(1, directory, {})
    servable = Servable(version, (16,), make_engine=lambda version, like: whole._engine)
    with pytest.raises(ConfigError, match=words) as error:
        servable.self_check()
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_archive_and_no_program_are_refused(exported, tmp_path):
    _, model_dir, whole = exported
    directory = shutil.copytree(model_dir / "1", tmp_path / "1")
    version = Version(1, directory, {})
    (directory / "self_check.npz").write_bytes(b"x" * 200)
    with pytest.raises(ConfigError, match="holds no checked rows"):
        Servable(version, (16,), make_engine=lambda version, like: whole._engine).self_check()
    program = (directory / "program.stablehlo").read_bytes()
    magic = program.index(b"ML\xefR")  # Where MLIR's own part begins.
    for other in (b"x" * 200, b"", program[: magic + 2] + b"x" + program[magic + 3 :]):
        with pytest.raises(ConfigError, match=r"program\.stablehlo cannot be read"):
            Program(other)
