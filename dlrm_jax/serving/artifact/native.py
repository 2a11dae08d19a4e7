"""An exported model scored by C++ on this machine's CPU (tables/kernels/score.cc): `--kernels=native`.

A row's score has the same bits in whatever batch it comes; it equals that of the exported program up to rounding, or,
where wide layers have weights and inputs of 8 bits (`--kernels=native_int8`), as near as was measured (int8_layers.py).
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dlrm_jax.config import ACTIVATIONS, BATCH_NORM, LAYER_NORM, ConfigError, HiddenConfig, ModelConfig, require
from dlrm_jax.host.cores import cores
from dlrm_jax.host.native_code import built
from dlrm_jax.serving.artifact import int8_layers
from dlrm_jax.serving.artifact.deltas import Change, Delta, Layout
from dlrm_jax.serving.artifact.loaded import NOTED, Engine
from dlrm_jax.serving.artifact.signature import TABLE_TYPES
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.weights import ArrayFile, TableFiles, read_dense, read_model
from dlrm_jax.tables.kernels.build import SCORE
from dlrm_jax.tables.pooling import POOLING_WEIGHTS

_DOT, _CAT, _CROSS = range(3)
_INTERACTIONS = {
    "dot": _DOT,
    "cat": _CAT,
    **dict.fromkeys(("cross", "full_cross", "parallel_cross", "parallel_full_cross"), _CROSS),
}
_BARE, _ACTIVATED, _HIDDEN = "bare", "activated", "hidden"
"""What comes after the product of an MLP's last layer: nothing, its activation, or all of a hidden layer."""
_OPTIONS = ("-ffp-contract=fast", "-pthread")
_ALIGNMENT = 64
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class _Array(ctypes.Structure):
    _fields_ = (
        ("data", _POINTER),
        *((name, _INT) for name in ("type", "rows", "columns", "row_stride", "column_stride")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Array) for name in ("panels", "bias", "norm", "codes", "scales", "sums")),
        *((name, _INT) for name in ("inputs", "outputs", "activation")),
        ("slope", ctypes.c_float),
    )


class _Feature(ctypes.Structure):
    _fields_ = (("rows", _Array), ("weights", _Array), ("hotness", _INT), ("mean", _INT))


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("num_dense", "num_slots", "width", "kind", "interaction", "self_interaction")),
        *((name, _INT) for name in ("num_features", "num_bottom", "num_cross", "cross_step", "num_tower", "num_top")),
        *((name, _Array) for name in ("feature_of_slot", "numbers", "embedded")),
        *((name, _POINTER) for name in ("features", "bottom", "cross", "tower", "top")),
        ("threshold", ctypes.c_float),
    )


def _library() -> ctypes.CDLL:
    return _opened(())


@functools.cache
def _opened(options: tuple[str, ...]) -> ctypes.CDLL:
    """score.cc, compiled with these options more."""
    library = ctypes.CDLL(str(built(SCORE, (*_OPTIONS, *options))))
    library.dlrm_panel.restype = library.dlrm_group.restype = _INT
    library.dlrm_has_byte_products.restype = ctypes.c_bool
    library.dlrm_wrong.argtypes, library.dlrm_wrong.restype = (_POINTER,), ctypes.c_char_p
    library.dlrm_score.argtypes = (_POINTER, *[ctypes.POINTER(_Array)] * 3, _INT)
    library.dlrm_score.restype = ctypes.c_char_p
    return library


def native_int8(version: Version, like: Engine | None = None) -> "NativeCpu":
    """The engine with int8 layers (loaded.MakeEngine), of a version that was measured with them, where they are fast.

    ConfigError for another version, and on a processor without an instruction for products of 8 bits.
    """
    int8_layers.require_measured(version)
    require(
        _library().dlrm_has_byte_products(),
        "this processor has no VNNI instructions, without which int8 layers are slower: use --kernels=native",
    )
    return NativeCpu(version, like, int8=True)


def require_scored(model: ModelConfig, asked: str) -> None:
    """ConfigError where score.cc has not what a model needs, or not on these devices; `asked` is who wants it."""
    require(
        model.compute_dtype == "float32",
        f"{asked} computes in float32, this model in {model.compute_dtype}",
    )
    require(model.is_plain, f"{asked} scores tables of one dim, one a feature; this model has others: leave it out")
    known = ", ".join(_INTERACTIONS)
    name = model.interaction.name
    require(name in _INTERACTIONS, f"{asked} scores {known}; this model has {name}: leave it out")
    platform = jax.default_backend()
    require(platform == "cpu", f"{asked} is for CPUs; this process uses a {platform}")


class NativeCpu:
    """A version's weights in this machine's memory, and the compiled forward pass (loaded.Engine)."""

    batch_multiple = 1
    fixed_sizes = False

    def __init__(
        self, version: Version, like: Engine | None = None, threads: int | None = None, int8: bool = False
    ) -> None:
        """Read a version's weights; with `int8` those of wide layers are coded (int8_layers.py).

        ConfigError where the model computes in bfloat16, and without a C++ compiler.
        """
        del like  # Nothing is compiled for one version.
        model, threshold = read_model(version)
        require_scored(model, f"--kernels={'native_int8' if int8 else 'native'}")
        self._score = _library().dlrm_score
        self.noted = int8_layers.NOTED if int8 else NOTED
        self._threads = threads or cores()
        self._num_dense, self._num_slots = model.num_dense, model.num_slots
        try:
            self._network = _Network.read(version, model, threshold, int8)
        except (LookupError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{version.directory}: model.json and the weights do not fit together: {error}; export anew"
            ) from error

    @property
    def num_coded(self) -> int:
        """Layers of 8 bits."""
        return self._network.num_coded

    def run(self, dense_BxN: np.ndarray, ids_BxK: np.ndarray) -> Sequence[np.ndarray]:
        """(probability_B, logit_B) of float32 and int32 arrays. TypeError for others, or of other shapes."""
        arrays = {"dense": _in_one_piece(dense_BxN), "ids": _in_one_piece(ids_BxK)}
        rows = len(arrays["dense"])
        out_2xB = np.empty((2, rows), np.float32)
        described = [_described(array) for array in (*arrays.values(), out_2xB)]
        wrong = self._score(self._network.address, *described, self._threads)
        if wrong is None:
            return out_2xB[0], out_2xB[1]
        if wrong == b"memory":
            raise MemoryError("no memory for a batch's activations")
        name = wrong.decode()
        array, dtype = arrays[name], {"dense": "float32", "ids": "int32"}[name]
        expected = [rows, {"dense": self._num_dense, "ids": self._num_slots}[name]]
        raise TypeError(f"{name}: {array.dtype}{list(array.shape)}; expected {dtype}{expected}")

    def change(self, delta: Delta, layout: Layout) -> Change:
        """Rows are written into the tables that are there; the layers are other ones, beside those until then."""
        del layout
        before, after = self._network, self._network.with_dense(delta.dense)
        old = {table: before.rows[table][row_M] for table, (row_M, _) in delta.rows.items()}

        def apply() -> None:
            for table, (row_M, rows) in delta.rows.items():
                before.rows[table][row_M] = rows
            self._network = after

        def undo() -> None:
            for table, (row_M, _) in delta.rows.items():
                before.rows[table][row_M] = old[table]
            self._network = before

        return Change(apply, undo)


class _Network:
    """What score.cc calls a Model, at `address`: `rows` are its tables by name, and all that it points to is kept."""

    def __init__(
        self,
        model: ModelConfig,
        threshold: float,
        kind: str,
        int8: bool,
        dense: dict[str, np.ndarray],
        rows: dict[str, np.ndarray],
    ) -> None:
        """ValueError where sizes or types do not fit together."""
        self._made_of, self.rows, self.num_coded = (model, threshold, kind, int8), rows, 0
        self._kept: list[Any] = []
        self.address = self._describe(dense)

    @classmethod
    def read(cls, version: Version, model: ModelConfig, threshold: float, int8: bool) -> "_Network":
        """That of a version."""
        files = TableFiles(version)
        rows = {table.name: _aligned(files.stored(table.name)) for table in model.tables}
        if model.learned_pooling:
            weights = {table.name: _aligned(files.pooling_weights(table.name)) for table in model.tables}
            rows |= {name + POOLING_WEIGHTS: array for name, array in weights.items()}
        return cls(model, threshold, files.kind, int8, read_dense(version), rows)

    def with_dense(self, dense: dict[str, np.ndarray]) -> "_Network":
        """The same tables under other layers."""
        return _Network(*self._made_of, dense, self.rows)

    def _describe(self, dense: dict[str, np.ndarray]) -> int:
        model, threshold, kind, _ = self._made_of
        features = self._features(model)
        name, options = model.interaction.name, model.interaction.options
        bottom = self._mlp(dense, "bottom_mlp", len(model.bottom_mlp), model.bottom_hidden, _ACTIVATED)
        top = self._mlp(dense, "top_mlp", len(model.top_mlp), model.top_hidden, _BARE)
        tower_mlp = options.get("tower_mlp", ())
        tower = self._mlp(dense, f"{name}/tower", len(tower_mlp), model.top_hidden, _HIDDEN)
        cross = self._cross(dense, f"{name}/cross" if tower_mlp else name, options.get("cross_layers", 0))
        hotness = [feature.hotness for feature in model.features]
        feature_of_slot = np.repeat(np.arange(len(hotness), dtype=np.int64), hotness)
        described = _Model(
            num_dense=model.num_dense,
            num_slots=model.num_slots,
            width=model.embedding_dim,
            kind=TABLE_TYPES.index(kind),
            interaction=_INTERACTIONS[name],
            self_interaction=options.get("self_interaction", False),
            num_features=len(features),
            num_bottom=len(bottom),
            num_cross=len(cross),
            cross_step=1 if "full" in name else 2,
            num_tower=len(tower),
            num_top=len(top),
            features=self._address_of(features),
            feature_of_slot=_described(self._keep(feature_of_slot[None])),
            **self._numbers(dense, model),
            bottom=self._address_of(bottom),
            cross=self._address_of(cross),
            tower=self._address_of(tower),
            top=self._address_of(top),
            threshold=threshold,
        )
        address = self._address_of(described)
        wrong = _library().dlrm_wrong(address)
        if wrong is not None:
            raise ValueError(f"{wrong.decode()}, of which a size or a type is another")
        return address

    def _numbers(self, dense: dict[str, np.ndarray], model: ModelConfig) -> dict[str, _Array]:
        if not model.embedded:
            return {"numbers": _Array(), "embedded": _Array()}
        columns = np.array(model.embedded, np.int64)[None]
        return {
            "numbers": _described(self._keep(dense["numbers/vectors"])),
            "embedded": _described(self._keep(columns)),
        }

    def _features(self, model: ModelConfig) -> ctypes.Array[_Feature]:
        features = [
            _Feature(
                rows=_described(self.rows[feature.table]),
                weights=_described(self.rows[feature.table + POOLING_WEIGHTS]) if model.learned_pooling else _Array(),
                hotness=feature.hotness,
                mean=feature.pooling == "mean",
            )
            for feature in model.features
        ]
        return (_Feature * len(features))(*features)

    def _mlp(
        self, dense: dict[str, np.ndarray], name: str, depth: int, hidden: HiddenConfig, last: str
    ) -> ctypes.Array[_Layer]:
        if hidden.norm == BATCH_NORM:
            raise ValueError("an export has no batch norms")
        layers = []
        for i in range(depth):
            layer = self._layer(*(dense[f"{name}/layer_{i}/{leaf}"] for leaf in ("kernel", "bias")))
            is_hidden = i < depth - 1 or last == _HIDDEN
            if is_hidden and hidden.norm == LAYER_NORM:
                norm_2xW = np.stack([dense[f"{name}/norm_{i}/{leaf}"] for leaf in ("scale", "bias")])
                layer.norm = _described(self._keep(norm_2xW))
            if is_hidden or last == _ACTIVATED:
                layer.activation = 1 + ACTIVATIONS.index(hidden.activation)
                if hidden.activation == "prelu":
                    layer.slope = dense[f"{name}/activation_{i}/negative_slope"].item()
            layers.append(layer)
        return (_Layer * len(layers))(*layers)

    def _cross(self, dense: dict[str, np.ndarray], name: str, depth: int) -> ctypes.Array[_Layer]:
        layers = []
        for i in range(depth):
            if f"{name}/v_{i}" in dense:  # Of low rank.
                v_IxR = dense[f"{name}/v_{i}"]
                layers.append(self._layer(v_IxR, np.zeros(v_IxR.shape[1], np.float32)))
            layers.append(self._layer(dense[f"{name}/w_{i}"], dense[f"{name}/b_{i}"]))
        return (_Layer * len(layers))(*layers)

    def _layer(self, kernel: np.ndarray, bias: np.ndarray) -> _Layer:
        panel, (inputs, outputs) = _library().dlrm_panel(), kernel.shape
        padded_bias = self._keep(np.pad(bias, (0, -bias.size % panel))[None])
        layer = _Layer(bias=_described(padded_bias), inputs=inputs, outputs=outputs)
        if self._made_of[-1] and int8_layers.is_coded(inputs, outputs):
            self.num_coded += 1
            weights = int8_layers.coded(kernel)
            group = _library().dlrm_group()
            codes = np.pad(weights.codes, ((0, -inputs % group), (0, -outputs % panel)))
            rows = codes.reshape(len(codes) // group, group, -1, panel).transpose(2, 0, 3, 1).reshape(-1, panel * group)
            layer.codes = _described(self._keep(rows))
            for name, column in (("scales", weights.scales), ("sums", weights.sums)):
                setattr(layer, name, _described(self._keep(np.pad(column, (0, -outputs % panel))[None])))
        else:
            columns = np.pad(kernel, ((0, 0), (0, -outputs % panel))).reshape(inputs, -1, panel)
            layer.panels = _described(self._keep(columns.transpose(1, 0, 2).reshape(-1, panel)))
        return layer

    def _keep(self, array: np.ndarray) -> np.ndarray:
        copy = _aligned(array)
        self._kept.append(copy)
        return copy

    def _address_of(self, value: Any) -> int:
        """Of a value of ctypes, which this object holds."""
        self._kept.append(value)
        return ctypes.addressof(value)


def _aligned(array: np.ndarray | ArrayFile) -> np.ndarray:
    """A copy at the start of a cache line; NumPy puts large ones on huge pages."""
    size = math.prod(array.shape) * array.dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -_address(memory) % _ALIGNMENT
    copy = memory[first : first + size].view(array.dtype).reshape(array.shape)
    if isinstance(array, ArrayFile):
        array.read_into(copy)
    else:
        copy[...] = array
    return copy


def _in_one_piece(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array if array.flags.c_contiguous and array.flags.aligned else array.copy(order="C")


def _described(array: np.ndarray) -> _Array:
    """An array as score.cc is told of it, which decides whether to read it; who calls holds it."""
    bits = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    sizes = (*bits.shape, *bits.strides) if bits.ndim == 2 else (-1, -1, 0, 0)
    return _Array(_address(bits), int.from_bytes(bits.dtype.str.encode()[:7], "little"), *sizes)


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
