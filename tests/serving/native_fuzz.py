"""Hostile calls of the C++ scorer, a function of a seed: `python -m tests.serving.native_fuzz SEED MODELS`.

tests/native_fuzz_test.py runs it with score.cc built under the address and undefined-behaviour sanitizers. Whatever is
passed, there is a score or one of the errors that the API promises; the last line counts them.
"""

import concurrent.futures
import ctypes
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections import Counter
from typing import Any
from unittest import mock

import jax
import numpy as np

from dlrm_jax.config import (
    ACTIVATIONS,
    LAYER_NORM,
    NO_NORM,
    ConfigError,
    FeatureConfig,
    HiddenConfig,
    ModelConfig,
    TableConfig,
    to_dict,
)
from dlrm_jax.serving.artifact import native
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.loaded import load
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES
from dlrm_jax.serving.artifact.signature import ServedFeature, Signature
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.written import flat, write_json, write_weights
from dlrm_jax.training.state import init_dense
from tests.helpers import meeting, tiny_model
from tests.serving_helpers import export_tiny

NUMBERS = (-(2**63), -(2**31), -5, -1, 0, 1, 2, 3, 16, 17, 65536, 2**20, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
VALUES = (-5, 0, 1, 3, 65536, 2**31, "x", None, True, [], {}, 1.5, "int8", "float32", "mean")
TYPES = ("f4", ">f4", "f2", "f8", "i4", ">i4", "u4", "i8", "u8", "u1", "?", "c8", "O", "U3", "V4", "M8[s]")


class Fuzz:
    """One run of it."""

    def __init__(self, seed: int, directory: pathlib.Path) -> None:
        self.rng, self.directory, self.counts = np.random.default_rng(seed), directory, Counter()

    def run(self, models: int) -> None:
        """Everything, on so many models."""
        for i in range(models):
            model, kind = self.model(), str(self.rng.choice(TABLE_TYPES))
            version = self.write(self.directory / str(i), model, kind)
            engine = NativeCpu(version, threads=1 + i % 3, int8=i % 2 == 0)
            self.whole(engine, model)
            for _ in range(40):
                self.call(engine, model)
            for _ in range(60):
                self.arguments(engine, model)
            for _ in range(60):
                self.structures(engine, model)
            for _ in range(12):
                self.files(version)
        self.while_files_change()
        self.while_ids_change()
        self.public()

    def pick(self, *choices: Any) -> Any:
        """One of them."""
        return choices[self.rng.integers(len(choices))]

    def attempt(self, what: str, call: Any, *errors: type[Exception]) -> Any:
        """Counts what came of a call; other errors than those are this script's failure."""
        try:
            result = call()
        except errors as error:
            self.counts[f"{what}: {type(error).__name__}"] += 1
            return None
        self.counts[f"{what}: scored"] += 1
        return result

    def model(self) -> ModelConfig:
        """A small model."""
        width = int(self.rng.integers(1, 40))
        tables = tuple(
            TableConfig(f"t{i}", int(self.rng.integers(1, 50)), width) for i in range(self.rng.integers(1, 4))
        )
        features = tuple(
            FeatureConfig(f"f{i}", self.pick(*tables).name, int(self.rng.integers(1, 5)), self.pick("sum", "mean"))
            for i in range(max(len(tables), self.rng.integers(1, 7)))
        )
        features = tuple(
            dataclasses.replace(feature, table=tables[i].name) if i < len(tables) else feature
            for i, feature in enumerate(features)
        )
        fields = {
            "num_dense": int(self.rng.integers(1, 20)) * self.pick(0, 1, 1),
            "tables": tables,
            "features": features,
            "bottom_mlp": (*self.rng.integers(1, 70, self.rng.integers(0, 2)).tolist(), width),
            "top_mlp": (*self.rng.integers(1, 200, self.rng.integers(0, 3)).tolist(), 1),
            "interaction": self.pick(*native._INTERACTIONS),
            "self_interaction": self.pick(True, False),
            "cross_layers": int(self.rng.integers(1, 3)),
            "cross_rank": int(self.rng.integers(1, 40)),
            "tower_mlp": tuple(self.rng.integers(1, 70, self.rng.integers(1, 3)).tolist()),
            "learned_pooling": self.pick(True, False),
        }
        columns = range(fields["num_dense"])
        fields["embedded_columns"] = tuple(column for column in columns if self.pick(True, False))
        fields["embed_numbers"] = fields["num_dense"] > 0 and self.pick(True, False)
        if not fields["num_dense"] or (fields["embed_numbers"] and self.pick(True, False)):
            fields["bottom_mlp"] = ()
        hidden = [HiddenConfig(self.pick(*ACTIVATIONS), self.pick(NO_NORM, LAYER_NORM)) for _ in range(2)]
        fields |= {"bottom_hidden": hidden[0], "top_hidden": hidden[1]}
        return ModelConfig(**meeting(fields))

    def write(self, directory: pathlib.Path, model: ModelConfig, kind: str) -> Version:
        """A version's weights, without a program."""
        directory.mkdir()
        shapes = jax.eval_shape(lambda: init_dense(model, 0))
        draw = lambda shape: self.rng.normal(size=shape).astype(np.float32)  # noqa: E731
        dense = flat(jax.tree.map(lambda leaf: draw(leaf.shape), shapes))

        def pieces(name: str) -> list[np.ndarray]:
            table = model.table(name.split("/")[0])
            return [draw((table.num_embeddings, 1 if "/" in name else table.embedding_dim))]

        index, _, _ = write_weights(directory, model, dense, pieces, kind)
        served = tuple(
            ServedFeature(f.name, f.table, f.hotness, f.pooling, model.table(f.table).num_embeddings)
            for f in model.features
        )
        names = tuple(f"x{i}" for i in range(model.num_dense))
        signature = Signature("fuzz", names, served, model.embedding_dim, kind)
        write_json(directory / "model.json", {"model": to_dict(model), "loss_threshold": 0.0})
        write_json(directory / "signature.json", to_dict(signature))
        write_json(directory / "weights.json", index)
        return Version(0, directory, {})

    def inputs(self, model: ModelConfig, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the right type and shape; any ids."""
        ids = self.rng.integers(-3, 60, (rows, model.num_slots))
        ids[self.rng.random(ids.shape) < 0.05] = self.pick(-(2**31), 2**31 - 1)
        return self.rng.normal(size=(rows, model.num_dense)).astype(np.float32), ids.astype(np.int32)

    def whole(self, engine: NativeCpu, model: ModelConfig) -> None:
        """A row's bits do not depend on its batch."""
        dense, ids = self.inputs(model, 200)
        probability, logit = engine.run(dense, ids)
        for first in (0, 7, 199):
            part = engine.run(dense[first : first + 50], ids[first : first + 50])
            np.testing.assert_array_equal(part[1], logit[first : first + 50])
        assert np.isfinite(probability).all()
        self.counts["whole batches: scored"] += 4

    def spoilt(self, array: np.ndarray) -> Any:
        """The array in another type, shape or order."""
        way = self.rng.integers(7)
        if way == 0:
            with np.errstate(over="ignore", invalid="ignore"):
                return array.astype(self.pick(*TYPES) if array.dtype.kind == "i" else "f8", casting="unsafe")
        if way == 1:
            return np.lib.stride_tricks.as_strided(array, strides=(0, array.itemsize))
        if way == 2:
            return array[:, :: self.pick(-1, 2)][self.rng.integers(len(array) + 1) :]
        if way == 3:
            return np.zeros(self.rng.integers(0, 5, self.rng.integers(0, 5)), self.pick(*TYPES))
        if way == 4:
            return self.pick(None, 3, "x", [], [[1.0]], array.tolist(), array[0], array.T, array[None])
        if way == 5:
            return np.asfortranarray(array)
        raw = np.frombuffer(b"." + array.tobytes(), np.uint8)[1:]
        return raw.view(array.dtype).reshape(array.shape)  # Not aligned, not writable.

    def call(self, engine: NativeCpu, model: ModelConfig) -> None:
        """`run`, one of its arrays or both spoilt."""
        inputs = list(self.inputs(model, int(self.rng.integers(1, 120))))
        for i in self.pick((0,), (1,), (0, 1), ()):
            inputs[i] = self.spoilt(inputs[i])
        out = self.attempt("run", lambda: engine.run(*inputs), TypeError, ValueError)
        assert out is None or out[0].shape == (len(inputs[0]),)

    def arguments(self, engine: NativeCpu, model: ModelConfig) -> None:
        """The C function itself, told lies that are seen: of what cannot be seen there is none."""
        rows = int(self.rng.integers(1, 9))
        dense, ids = self.inputs(model, rows)
        out = np.zeros((2, rows), np.float32)
        described = [native._described(array) for array in (dense, ids, out)]
        lied = self.pick(*described)
        field = self.pick("data", "type", "rows", "columns", "row_stride", "column_stride", "")
        is_lie = False
        if field:
            true = getattr(lied, field)
            lie = self.pick(None, (true or 0) + 1) if field == "data" else int(self.pick(*NUMBERS))
            setattr(lied, field, lie)
            # Strides along which there is one number, and what is said of no number, mean nothing.
            steps = {"row_stride": lied.rows, "column_stride": lied.columns}.get(field, 2)
            is_lie = lie != true and steps > 1 and lied.rows * lied.columns != 0
        threads = int(self.pick(*NUMBERS[:10]))
        wrong = engine._score(engine._network.address, *described, threads)
        assert wrong or not is_lie, (field, lie)
        self.counts[f"C++: {'refused' if wrong else 'scored'}"] += 1

    def structures(self, engine: NativeCpu, model: ModelConfig) -> None:
        """A model one of whose numbers is another."""
        copy = native._Model.from_buffer_copy(native._Model.from_address(engine._network.address))
        features = (native._Feature * copy.num_features).from_buffer_copy(
            (native._Feature * copy.num_features).from_address(copy.features)
        )
        top = (native._Layer * copy.num_top).from_buffer_copy((native._Layer * copy.num_top).from_address(copy.top))
        copy.features, copy.top = ctypes.addressof(features), ctypes.addressof(top)
        lengths = ("num_bottom", "num_cross", "num_tower", "num_top")  # Of arrays: nothing else says where these end.
        numbers = [name for name, kind in native._Model._fields_ if kind is native._INT and name not in lengths]
        target, name = self.pick(
            (copy, self.pick(*numbers)),
            (features[0], self.pick("hotness", "mean")),
            (features[-1], "hotness"),
            (top[0], self.pick("inputs", "outputs", "activation")),
            (top[0].norm, self.pick("type", "rows", "columns", "row_stride")),
            (top[-1].panels, self.pick("type", "rows", "columns", "row_stride")),
            *(
                (array, self.pick("type", "rows", "columns", "row_stride"))
                for array in (top[0].codes, top[0].scales, top[0].sums)
                if array.data
            ),
            (features[0].rows, self.pick("type", "columns", "row_stride", "column_stride")),
        )
        true = getattr(target, name)
        setattr(target, name, self.pick(*NUMBERS, true + 1, true - 1))
        dense, ids = self.inputs(model, 5)
        described = [native._described(array) for array in (dense, ids, np.zeros((2, 5), np.float32))]
        wrong = engine._score(ctypes.addressof(copy), *described, 2)
        assert wrong or name != "hotness" or getattr(target, name) == true
        self.counts[f"C++ model: {'refused' if wrong else 'scored'}"] += 1

    def files(self, version: Version) -> None:
        """A version one of whose files says something else."""
        name = self.pick("model.json", "signature.json", "weights.json", "array")
        arrays = sorted(version.directory.glob("*/*.npy"))
        path = self.pick(*arrays) if name == "array" else version.directory / name
        whole = path.read_bytes()
        if name == "array":
            array = np.atleast_1d(np.load(path))  # One of a single number has no rows.
            np.save(path, self.pick(array[:-1], array.astype("f8"), array[..., None], array.ravel(), array.T, array[0]))
        else:
            values = json.loads(whole)
            self.change(values)
            path.write_text(json.dumps(values))

        def score() -> Any:
            engine = NativeCpu(version, threads=1)
            rows = np.zeros((3, engine._num_dense), np.float32)
            return engine.run(rows, np.full((3, engine._num_slots), self.pick(0, 5, 60), np.int32))

        self.attempt("files", score, ConfigError)
        path.write_bytes(whole)

    def change(self, values: Any) -> None:
        """Set one value somewhere in what JSON gave."""
        while True:
            keys = list(values) if isinstance(values, dict) else list(range(len(values)))
            if not keys:
                return
            key = self.pick(*keys)
            inner = values[key]
            if isinstance(inner, dict | list) and inner and self.rng.random() < 0.8:
                values = inner
                continue
            if self.rng.random() < 0.2:
                del values[key]
            else:
                values[key] = self.pick(*VALUES)
            return

    def while_files_change(self) -> None:
        """Scores stay those of what was read, while files are replaced and cut and other engines come and go."""
        model = self.model()
        version = self.write(self.directory / "changing", model, "float32")
        engine = NativeCpu(version, threads=2)
        dense, ids = self.inputs(model, 100)
        want = engine.run(dense, ids)[1]

        def check(_: int) -> None:
            np.testing.assert_array_equal(engine.run(dense, ids)[1], want)

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            checks = pool.map(check, range(200))
            for _ in range(8):
                other = NativeCpu(version, threads=2)
                other.run(dense, ids)
                del other
            for path in version.directory.glob("*/*.npy"):
                with path.open("r+b") as file:
                    file.write(b"\xff" * path.stat().st_size)
                os.truncate(path, 100)
            self.counts["while files change: scored"] += len(list(checks))

    def while_ids_change(self) -> None:
        """Whoever passed the ids writes others, inside the tables and far outside, while they are scored."""
        model = tiny_model(learned_pooling=True)
        engine = NativeCpu(self.write(self.directory / "ids", model, "float32"), threads=1)
        dense, ids = self.inputs(model, 2000)
        inside, outside = np.zeros_like(ids), np.full_like(ids, 2**31 - 1)

        def change() -> None:
            for _ in range(30_000):  # Read twice, an id was seen to be another after a few thousand.
                ids[...] = inside
                ids[...] = outside

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            changing = pool.submit(change)
            while not changing.done():
                assert np.isfinite(engine.run(dense, ids)[0]).all()
                self.counts["while ids change: scored"] += 1

    def public(self) -> None:
        """What serving.load gives, asked for anything."""
        model = tiny_model()
        export_tiny(self.directory / "public", model)
        servable = load(self.directory / "public", batch_sizes=(1, 64), make_engine=NativeCpu)
        for _ in range(300):
            dense, ids = self.inputs(model, int(self.rng.integers(1, 150)))
            inputs = [dense, np.clip(ids, -1, self.pick(0, 1, 50))]
            for i in self.pick((0,), (1,), (0, 1), ()):
                inputs[i] = self.spoilt(inputs[i])
            self.attempt("predict", lambda: servable.predict(*inputs), BadRequest)  # noqa: B023
            values = (0, 0, 0, 0, 0, 0, 0, 0, None, -1, 1, 2**70, 1.5, "x", [0] * 9, [[0]], {}, True, [0, None])
            row = {name: self.pick(*values) for name in servable.reader.columns}
            self.attempt("predict_rows", lambda: servable.predict_rows([row]), BadRequest)  # noqa: B023


def main(seed: int, models: int) -> None:
    """Run it; score.cc is built with what DLRM_SANITIZE says."""
    options = (*native._OPTIONS, *os.environ.get("DLRM_SANITIZE", "").split())
    with tempfile.TemporaryDirectory() as directory, mock.patch.object(native, "_OPTIONS", options):
        fuzz = Fuzz(seed, pathlib.Path(directory))
        fuzz.run(models)
    print(json.dumps(fuzz.counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
