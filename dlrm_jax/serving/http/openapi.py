"""The OpenAPI description of the server, which tests draw requests from."""

from typing import Any

_SCALAR = {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]}
_VALUE = {"anyOf": [*_SCALAR["anyOf"], {"type": "array", "items": _SCALAR}]}
_ROW = {"type": "object", "additionalProperties": _VALUE}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}

_SCORE_REQUEST = {
    "type": "object",
    "description": "Raw values as in the training log, by column; null is a missing one. A column is in every row, or "
    "in shared, which then counts for all rows.",
    "properties": {"rows": {"type": "array", "items": _ROW}, "shared": _ROW},
    "required": ["rows"],
    "additionalProperties": False,
}
_SCORE_RESPONSE = {
    "type": "object",
    "properties": {
        "probability": {"type": "array", "items": {"type": "number"}},
        "model_version": {"type": "string"},
        "unknown": {"type": "object", "additionalProperties": {"type": "integer"}},
    },
    "required": ["probability", "model_version"],
}
_NUMBERS = {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}}
_INPUT = {
    "type": "object",
    "properties": {
        "name": {"enum": ["dense", "ids"]},
        "datatype": {"enum": ["FP32", "FP64", "INT32", "INT64"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
        "data": _NUMBERS,
    },
    "required": ["name", "datatype", "shape"],
}
_OUTPUT = {
    "type": "object",
    "properties": {
        "name": {"enum": ["probability", "logit"]},
        "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
    },
    "required": ["name"],
}
_INFER_REQUEST = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}},
        "inputs": {"type": "array", "items": _INPUT, "minItems": 2, "maxItems": 2},
        "outputs": {"type": "array", "items": _OUTPUT},
    },
    "required": ["inputs"],
}


def describe_api() -> dict[str, Any]:
    """The description, as JSON values."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
    paths: dict[str, Any] = {
        "/v1/score": {"post": _post("Score rows of raw values", _SCORE_REQUEST, _SCORE_RESPONSE)},
        "/v2": {"get": _get("Server metadata")},
        "/v2/health/live": {"get": _get("Does the process answer?")},
        "/v2/health/ready": {"get": _get("Is a model loaded and compiled?")},
        "/metrics": {"get": _get("Prometheus metrics")},
        "/status.json": {"get": _get("What the page at / shows")},
    }
    for prefix, parameters in (("", [name]), ("/versions/{version}", [name, version])):
        base = f"/v2/models/{{name}}{prefix}"
        paths[base] = {"get": _get("Model metadata", parameters)}
        paths[f"{base}/ready"] = {"get": _get("Is the model ready?", parameters)}
        infer = _post("Score tensors of numbers", _INFER_REQUEST, {"type": "object"}, parameters)
        paths[f"{base}/infer"] = {"post": infer}
    return {"openapi": "3.1.0", "info": {"title": "dlrm_jax server", "version": "1"}, "paths": paths}


def _get(summary: str, parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"summary": summary, "parameters": parameters or [], "responses": {"200": {"description": "OK"}}}


def _post(
    summary: str, request: dict[str, Any], response: dict[str, Any], parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    refusals = {
        "400": "names the field",
        "408": "the body did not arrive in time",
        "413": "the body is too large",
        "431": "the headers are too long",
        "415": "wrong content type",
        "429": "the queue is full; Retry-After says when to come back",
        "503": "not ready, stopping, or not scored in time",
    }
    responses = {status: {"description": text, "content": _content(_ERROR)} for status, text in refusals.items()}
    return {
        "summary": summary,
        "parameters": parameters or [],
        "requestBody": {"required": True, "content": _content(request)},
        "responses": {"200": {"description": "OK", "content": _content(response)}, **responses},
    }


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
