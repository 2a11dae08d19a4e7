"""Damaged checkpoints: what is restored is what was saved, or one line says what is wrong."""

import os
import shutil

import jax
import numpy as np
import pytest

from dlrm_jax.config import ConfigError, FeatureConfig, ModelConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.tables.reshard import Kind
from dlrm_jax.training.checkpoint import BEST, Checkpoints
from dlrm_jax.training.placed import Placed, on_one_device
from tests.helpers import optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory with one best checkpoint, placements that read it, what each reads): tables are most of its bytes."""
    tables = (TableConfig("t", 900, 8), TableConfig("u", 300, 8))
    config = ModelConfig(
        num_dense=3,
        tables=tables,
        features=(FeatureConfig("f", "t"), FeatureConfig("g", "u")),
        bottom_mlp=(8,),
        top_mlp=(1,),
    )
    one = on_one_device(config, optimizer("rowwise_adagrad", "adam"))
    mesh = MeshShape(1, 2)
    two = Placed(config, one.optimizer, make_plan(config, mesh, "row_wise"), make_mesh(mesh))
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(BEST, one.init_state(0), one, {"progress": {"best_value": 0.5}})
    return directory, (one, two), [read(directory, placed) for placed in (one, two)]


def read(directory, placed):
    with Checkpoints(directory, read_only=True) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore(BEST, placed)), checkpoints.record(BEST)


def require_equal_or_refused(directory, placed, good) -> str:
    """Whether a damaged checkpoint gives what the whole one gave, or one clear line."""
    try:
        state, record = read(directory, placed)
    except ConfigError as error:
        assert "\n" not in str(error) and f"cannot read checkpoint {directory}" in str(error)
        assert "move it away" in str(error)
        return "refused"
    jax.tree.map(np.testing.assert_array_equal, state, good[0])
    assert record == good[1]
    return "equal"


def test_a_flipped_byte_is_seen_under_every_plan(saved, tmp_path):
    """Of the bytes of a checkpoint most are weights; Orbax alone gives other weights without a word."""
    directory, placements, good = saved
    files = sorted(path for path in (directory / "checkpoints" / BEST / "0").rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    rng, found = np.random.default_rng(0), []
    for trial in range(16):
        copy = shutil.copytree(directory, tmp_path / str(trial))
        path = copy / files[rng.choice(len(files), p=sizes / sizes.sum())].relative_to(directory)
        flip(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
        found.append(require_equal_or_refused(copy, placements[trial % 2], good[trial % 2]))
    assert found.count("refused") >= 8


def test_a_zeroed_sector_is_seen_or_changes_nothing(saved, tmp_path):
    directory, placements, good = saved
    files = sorted(path for path in (directory / "checkpoints" / BEST / "0").rglob("*") if path.is_file())
    files = sorted(files, key=lambda path: path.stat().st_size)[-8:]
    found = []
    for trial, file in enumerate(files):
        copy = shutil.copytree(directory, tmp_path / str(trial))
        path = copy / file.relative_to(directory)
        with path.open("r+b") as opened:
            opened.seek(trial % 2 * 512)
            opened.write(bytes(min(512, path.stat().st_size - opened.tell())))
        found.append(require_equal_or_refused(copy, placements[trial % 2], good[trial % 2]))
    assert found.count("refused") >= 5, found


def test_damage_is_said_in_one_line_where_rows_are_read_one_after_the_other(saved, tmp_path):
    """As an export reads them."""
    directory, (one, _), _ = saved
    copy = shutil.copytree(directory, tmp_path / "copy")
    path = max((copy / "checkpoints" / BEST / "0" / "tables").rglob("*"), key=lambda path: path.stat().st_size)
    flip(path, path.stat().st_size // 2, 3)
    with Checkpoints(copy, read_only=True) as checkpoints:
        _, source = checkpoints.read_model(BEST, 0, one)
        with pytest.raises(ConfigError, match=r"cannot read checkpoint .*best/0: .*; move it away"):
            source.rows(Kind("tables", weights=False, per_row=False), "t", 0, 1, 900)


def flip(path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_any_file_may_be_missing_or_cut(saved, tmp_path, damage):
    directory, placements, good = saved
    files = [path for path in (directory / "checkpoints" / BEST / "0").rglob("*") if path.is_file()]
    found = []
    for i, path in enumerate(files):
        copy = shutil.copytree(directory, tmp_path / str(i))
        spoilt = copy / path.relative_to(directory)
        if damage == "deleted":
            spoilt.unlink()
        else:
            os.truncate(spoilt, spoilt.stat().st_size // 2)
        found.append(require_equal_or_refused(copy, placements[i % 2], good[i % 2]))
        shutil.rmtree(copy)
    assert found.count("refused") >= 5, found  # Most others are what Orbax notes beside the arrays.


@pytest.mark.parametrize("item", ["checksums", "dense", "record", "tables"])
def test_every_part_must_be_there(saved, tmp_path, item):
    directory, placements, good = saved
    copy = shutil.copytree(directory, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / BEST / "0" / item)
    assert require_equal_or_refused(copy, placements[0], good[0]) == "refused"
