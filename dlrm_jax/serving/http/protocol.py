"""Open Inference Protocol v2: requests and responses, as JSON and with the binary tensor extension.

https://github.com/kserve/open-inference-protocol, and Triton's binary data extension: the JSON part is as long as the
header Inference-Header-Content-Length says; tensors follow it in the order of the inputs, each as little-endian bytes.
"""

import itertools
import re
from typing import Any

import numpy as np
import orjson

from dlrm_jax.serving.artifact.errors import BadRequest, shown
from dlrm_jax.serving.artifact.loaded import Scores, Servable
from dlrm_jax.serving.artifact.raw_values import MAX_TEXT
from dlrm_jax.serving.artifact.signature import OUTPUTS

HEADER_LENGTH = "inference-header-content-length"
_MAX_ID = 1024
_BYTES_OF_A_CHARACTER = 12
"""At most, as in \\ud83d\\ude00."""
_NAMED = re.compile(rb'"([^"]{1,100})"\s*:[\s\[]*$')
_TYPES: dict[str, dict[str, np.dtype[Any]]] = {
    "dense": {"FP32": np.dtype("<f4"), "FP64": np.dtype("<f8")},
    "ids": {"INT32": np.dtype("<i4"), "INT64": np.dtype("<i8")},
}
_PYTHON_TYPES: dict[str, set[type]] = {"dense": {int, float}, "ids": {int}}


def parse_json(body: bytes, max_values: int, of_rows: bool = False) -> dict[str, Any]:
    """A JSON object; NaN, infinities, broken UTF-8 and what is nested too deeply are no JSON.

    Values are counted, and the texts of rows measured (`of_rows`), before any is made: parsing takes the interpreter
    for itself. A text's commas count too.
    """
    letters = np.frombuffer(body, np.uint8)
    values = sum(int(np.count_nonzero(letters == letter)) for letter in b",[{") if len(body) > max_values else 0
    if values > max_values:
        raise BadRequest(f"the body has about {values} values; at most {max_values}: send fewer rows or shorter bags")
    if of_rows:
        _require_short_texts(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {shown(value)}; expected a JSON object")
    return value


def _require_short_texts(body: bytes) -> None:
    """BadRequest where a text has more bytes than one of a field can have."""
    most = _BYTES_OF_A_CHARACTER * MAX_TEXT
    if len(body) <= most:
        return
    quotes = _quotes_of_texts(np.frombuffer(body, np.uint8))
    starts, ends = quotes[::2], quotes[1::2]
    sizes = np.append(ends, len(body))[: len(starts)] - starts - 1  # The last may lack its end.
    for i in np.flatnonzero(sizes > most)[:1]:
        start = int(starts[i])
        named = _NAMED.search(body[max(0, start - 200) : start])
        where = f"feature {shown(named[1].decode('utf8', 'replace'))}" if named else "the body"
        raise BadRequest(f"{where} has a value of {sizes[i]} bytes; a text has at most {MAX_TEXT} characters")


def _quotes_of_texts(letters: np.ndarray) -> np.ndarray:
    """Where the texts of some JSON begin and end, in turn: at the quotes that no backslash escapes.

    In a run of backslashes every other one escapes what follows: of `a\\\\\\"b` the first and the third.
    """
    quotes, slashes = np.flatnonzero(letters == ord('"')), np.flatnonzero(letters == ord("\\"))
    if not len(slashes):
        return quotes
    first = np.diff(slashes, prepend=-2) > 1
    in_run = slashes - slashes[first][np.cumsum(first) - 1]
    return np.setdiff1d(quotes, slashes[in_run % 2 == 0] + 1, assume_unique=True)


def parse_infer(
    body: bytes, header_length: str | None, max_values: int, has_numbers: bool = True
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """(the request's JSON, its dense and ids arrays with the shape that it says); dense may lack without numbers."""
    tail = b""
    if header_length is not None:
        digits = header_length if header_length.isascii() and header_length.isdecimal() else "9" * 13
        if len(digits) > 12 or int(digits) > len(body):
            raise BadRequest(
                f"header Inference-Header-Content-Length is {shown(header_length)}; the body has {len(body)}"
            )
        body, tail = body[: int(header_length)], body[int(header_length) :]
    request = parse_json(body, max_values)
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(tensor, dict) for tensor in inputs):
        raise BadRequest(f"inputs is {shown(inputs)}; expected a list of tensors")
    found: dict[str, np.ndarray] = {}
    for tensor in inputs:
        name = tensor.get("name")
        if not isinstance(name, str) or name not in _TYPES:
            raise BadRequest(f"inputs: unknown tensor {shown(name)}; known are {', '.join(_TYPES)}")
        if name in found:
            raise BadRequest(f"inputs: tensor {name!r} is given twice")
        found[name], tail = _tensor(name, tensor, tail)
    if tail:
        raise BadRequest(f"{len(tail)} bytes follow the last tensor")
    if not has_numbers and "dense" not in found and "ids" in found:
        found["dense"] = np.zeros((len(found["ids"]), 0), np.float32)
    missing = [name for name in _TYPES if name not in found]
    if missing:
        raise BadRequest(f"inputs: tensor {missing[0]!r} is missing")
    return request, found["dense"], found["ids"]


def _tensor(name: str, tensor: dict[str, Any], tail: bytes) -> tuple[np.ndarray, bytes]:
    kinds = _TYPES[name]
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in kinds:
        raise BadRequest(f"tensor {name!r}: datatype is {shown(datatype)}; expected {' or '.join(kinds)}")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        raise BadRequest(f"tensor {name!r}: shape is {shown(shape)}; expected [rows, columns]")
    count = shape[0] * shape[1]
    parameters = tensor.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest(f"tensor {name!r}: parameters is {shown(parameters)}; expected an object")
    size = parameters.get("binary_data_size")
    if size is not None:
        if type(size) is not int or size != count * kinds[datatype].itemsize or size > len(tail):
            raise BadRequest(
                f"tensor {name!r}: binary_data_size is {shown(size)}, shape {shape} of {datatype} needs "
                f"{count * kinds[datatype].itemsize}, and {len(tail)} bytes are left in the body"
            )
        return np.frombuffer(tail[:size], kinds[datatype]).reshape(shape), tail[size:]
    data = _flat(name, tensor.get("data"))
    if len(data) != count:
        raise BadRequest(f"tensor {name!r}: data has {len(data)} numbers, shape {shape} needs {count}")
    wrong = set(map(type, data)) - _PYTHON_TYPES[name]
    if wrong:
        value = next(value for value in data if type(value) in wrong)
        raise BadRequest(f"tensor {name!r}: {shown(value)} is not {'a number' if name == 'dense' else 'an integer'}")
    try:
        return np.array(data, np.float64 if name == "dense" else np.int64).reshape(shape), tail
    except OverflowError:
        raise BadRequest(f"tensor {name!r}: a number needs more than 64 bits") from None


def _flat(name: str, data: Any) -> list[Any]:
    """Numbers of a flat or a nested list."""
    if not isinstance(data, list):
        raise BadRequest(f"tensor {name!r}: data is {shown(data)}; expected a list")
    if data and isinstance(data[0], list):
        if not all(isinstance(row, list) for row in data):
            raise BadRequest(f"tensor {name!r}: data mixes lists and numbers")
        if len({len(row) for row in data}) > 1:
            raise BadRequest(f"tensor {name!r}: rows of data differ in length")
        return list(itertools.chain.from_iterable(data))
    return data


def wanted_outputs(request: dict[str, Any]) -> list[tuple[str, bool]]:
    """(name, whether as binary data) of each output asked for; all of them if none is."""
    parameters = request.get("parameters", {})
    outputs = request.get("outputs")
    if not isinstance(parameters, dict):
        raise BadRequest(f"parameters is {shown(parameters)}; expected an object")
    by_default = parameters.get("binary_data_output") is True
    if outputs is None or outputs == []:
        return [(name, by_default) for name in OUTPUTS]
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise BadRequest(f"outputs is {shown(outputs)}; expected a list of objects")
    wanted: list[tuple[str, bool]] = []
    for output in outputs:
        name, options = output.get("name"), output.get("parameters", {})
        if not isinstance(name, str) or name not in OUTPUTS:
            raise BadRequest(f"outputs: unknown tensor {shown(name)}; known are {', '.join(OUTPUTS)}")
        if not isinstance(options, dict):
            raise BadRequest(f"output {name!r}: parameters is {shown(options)}; expected an object")
        if any(name == known for known, _ in wanted):
            raise BadRequest(f"outputs: tensor {name!r} is asked for twice")
        wanted.append((name, options.get("binary_data", by_default) is True))
    return wanted


def infer_response(
    request: dict[str, Any], wanted: list[tuple[str, bool]], servable: Servable, scores: Scores
) -> tuple[bytes, int | None]:
    """(body, length of its JSON part if binary tensors follow)."""
    outputs, tails = [], []
    for name, binary in wanted:
        values: np.ndarray = getattr(scores, name)
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": [len(values)]}
        if binary:
            tails.append(values.astype("<f4", copy=False).tobytes())
            output["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            output["data"] = np.ascontiguousarray(values)
        outputs.append(output)
    answer = {
        "model_name": servable.signature.name,
        "model_version": str(scores.version),
        "outputs": outputs,
    }
    if isinstance(request.get("id"), str):
        answer["id"] = request["id"][:_MAX_ID]
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return head + b"".join(tails), len(head) if tails else None


def model_metadata(servable: Servable) -> dict[str, Any]:
    """The protocol's description of a model, the columns of its tensors beside it."""
    signature = servable.signature
    columns = [feature.name for feature in signature.features for _ in range(feature.hotness)]
    dense = [{"name": "dense", "datatype": "FP32", "shape": [-1, len(signature.dense_names)]}]
    return {
        "name": signature.name,
        "versions": [str(servable.version.number)],
        "platform": "jax_stablehlo",
        "inputs": [
            *(dense if signature.dense_names else ()),
            {"name": "ids", "datatype": "INT32", "shape": [-1, signature.num_slots]},
        ],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1]} for name in OUTPUTS],
        "parameters": {"dense_columns": list(signature.dense_names), "ids_columns": columns},
    }
