"""Requests drawn from the OpenAPI description, valid, nearly valid and wild: answers or refusals, never a failure."""

import http.client
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dlrm_jax.serving.http.openapi import describe_api
from tests.helpers import tiny_model
from tests.server_process import running
from tests.serving_helpers import export_tiny

pytestmark = pytest.mark.end_to_end

PATHS = describe_api()["paths"]
ROW = {"x0": 1, "x1": 2.5, "x2": -3, "user": 10, "item": 6, "history": [1, 2], "flag": None}
INFER = {
    "inputs": [
        {"name": "dense", "shape": [1, 3], "datatype": "FP32", "data": [1, 2.5, -3]},
        {"name": "ids", "shape": [1, 7], "datatype": "INT64", "data": [10, 6, 1, 2, -1, -1, -1]},
    ]
}
WILD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def drawn_from(schema: dict) -> st.SearchStrategy:
    """Values that a JSON schema of the description allows."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of(*map(drawn_from, schema["anyOf"]))
    kind = schema["type"]
    if kind == "array":
        return st.lists(
            drawn_from(schema["items"]), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 4)
        )
    if kind == "object":
        fields = {name: drawn_from(inner) for name, inner in schema.get("properties", {}).items()}
        required = {name: value for name, value in fields.items() if name in schema.get("required", ())}
        optional = {name: value for name, value in fields.items() if name not in required}
        known = st.fixed_dictionaries(required, optional=optional)
        more = schema.get("additionalProperties")
        if not isinstance(more, dict):
            return known
        named = st.sampled_from(list(ROW)) | st.text(max_size=5)
        extra = st.dictionaries(named, drawn_from(more), max_size=8)
        return st.tuples(known, extra).map(lambda pair: pair[1] | pair[0])
    return {
        "string": st.text(max_size=20),
        "number": st.integers() | st.floats(),
        "integer": st.integers(min_value=schema.get("minimum")),
        "boolean": st.booleans(),
        "null": st.none(),
    }[kind]


def request_schema(path: str) -> dict:
    return PATHS[path]["post"]["requestBody"]["content"]["application/json"]["schema"]


@st.composite
def spoilt(draw, good):
    """`good` with one value, at any depth, replaced by another."""
    value = json.loads(json.dumps(good))
    place, parent = value, None
    while isinstance(place, dict | list) and place and (parent is None or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        parent, place = (place, key), place[key]
    assert parent is not None
    parent[0][parent[1]] = draw(WILD)
    return value


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("fuzzed")
    export_tiny(model_dir, tiny_model())
    with running(model_dir, "--batch_sizes=1,16") as running_server:
        yield running_server


def check(server, path: str, body: bytes, headers: dict | None = None) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", path, body, {"content-type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert response.status < 500, (body, answer)
    if response.status == 200 and "binary" not in str(body):
        values = json.loads(answer)
        numbers = values.get("probability") or [v for output in values.get("outputs", ()) for v in output["data"]]
        assert np.isfinite(np.array(numbers, np.float64)).all()
    elif response.status != 200:
        assert response.status >= 400 and json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("path", "schema", "good"),
    [
        ("/v1/score", "/v1/score", {"rows": [ROW], "shared": {}}),
        ("/v2/models/tiny/infer", "/v2/models/{name}/infer", INFER),
    ],
)
def test_no_request_makes_the_server_fail(server, path, schema, good):
    check(server, path, json.dumps(good).encode())
    requests = drawn_from(request_schema(schema)) | spoilt(good) | WILD
    bodies = requests.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60)
    headers = st.sampled_from([{}] * 6 + [{"inference-header-content-length": "5"}, {"content-type": "x/y"}])

    @hypothesis.given(bodies, headers)
    @hypothesis.settings(max_examples=300, deadline=None)
    def all_requests(body, more):
        check(server, path, body, more)

    all_requests()
    check(server, path, json.dumps(good).encode())
