"""The server as its clients see it: both APIs, every kind of bad input, reload. Its bounds: serving_bounds_test.py."""

import concurrent.futures
import contextlib
import http.client
import json
import shutil
import socket
import struct
import time

import numpy as np
import pytest
import tritonclient.http as triton

from dlrm_jax.config import LossConfig
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.judging.measures import Measured, Units
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact.export import export_model, of_arrays
from dlrm_jax.serving.artifact.store import write_version
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.evaluation import Evaluator
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.run_config import ModelOptions, RunConfig
from tests.helpers import optimizer, tiny_model
from tests.prepared_helpers import digest, rows_of
from tests.server_process import running
from tests.serving.transform_test import prepared, without_label  # noqa: F401
from tests.serving_helpers import export_tiny, lively_state

pytestmark = pytest.mark.end_to_end

FLAGS = (
    "--batch_sizes=1,8,64",
    "--poll_seconds=0.2",
    "--max_rows=64",
    "--max_bag=50",
    "--max_body_bytes=200000",
    "--body_seconds=1",
    "--request_seconds=20",
    "--log_level=debug",
)


@pytest.fixture(scope="module")
def served(prepared):  # noqa: F811
    """(server, raw rows, their inputs, what the model says of them offline)."""
    rows, output, model_dir, *_ = prepared
    trained = rows_of(output)
    offline = load(model_dir, batch_sizes=(1, 8, 64)).predict(trained.dense_RxN, trained.ids_RxK)
    with running(model_dir, *FLAGS) as server:
        yield server, without_label(rows), trained, offline
        assert server.process.poll() is None, "the server died"


def tensors(dense, ids, binary=True):
    dense, ids = np.asarray(dense, np.float32), np.asarray(ids, np.int32)
    inputs = [triton.InferInput("dense", dense.shape, "FP32"), triton.InferInput("ids", ids.shape, "INT32")]
    for tensor, values in zip(inputs, (dense, ids), strict=True):
        tensor.set_data_from_numpy(values, binary_data=binary)
    return inputs


def test_triton_client_sees_server_and_model(served):
    server, _, trained, _ = served
    with contextlib.closing(triton.InferenceServerClient(f"127.0.0.1:{server.port}")) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("log")
        assert client.is_model_ready("log", "1") and not client.is_model_ready("log", "9")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        metadata = client.get_model_metadata("log")
    assert [tensor["shape"][1] for tensor in metadata["inputs"]] == [
        trained.dense_RxN.shape[1],
        trained.ids_RxK.shape[1],
    ]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["probability", "logit"]


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_gets_the_offline_scores(served, binary):
    server, _, trained, offline = served
    with contextlib.closing(triton.InferenceServerClient(f"127.0.0.1:{server.port}")) as client:
        outputs = [triton.InferRequestedOutput("probability", binary_data=binary)]
        inputs = tensors(trained.dense_RxN[:64], trained.ids_RxK[:64], binary)
        result = client.infer("log", inputs, outputs=outputs, request_id="seven")
        np.testing.assert_array_equal(result.as_numpy("probability"), offline[:64])
        assert result.get_response()["id"] == "seven"
        both = client.infer("log", inputs, model_version="1")
        np.testing.assert_allclose(1 / (1 + np.exp(-both.as_numpy("logit"))), both.as_numpy("probability"), atol=1e-6)


def test_triton_client_many_at_once_each_gets_its_own(served):
    server, _, trained, offline = served
    with contextlib.closing(triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=16)) as client:
        waiting = []
        for i in range(80):
            rows = slice(i, i + 1 + i % 5)
            waiting.append((rows, client.async_infer("log", tensors(trained.dense_RxN[rows], trained.ids_RxK[rows]))))
        for rows, request in waiting:
            got = request.get_result().as_numpy("probability")
            np.testing.assert_allclose(got, offline[rows], atol=1e-6)


def test_raw_rows_get_the_offline_scores(served):
    server, rows, _, offline = served
    status, _, answer = server.ask("POST", "/v1/score", {"rows": rows[:64]})
    assert status == 200 and answer["model_version"] == "1"
    np.testing.assert_allclose(answer["probability"], offline[:64], atol=1e-6)


def test_training_evaluate_export_and_server_score_alike(served, prepared, tmp_path):  # noqa: F811
    """Each row's probability is one number, whoever says it, and so is each metric."""
    server, rows, _, offline = served
    _, output, _, model, state = prepared
    dataset = open_prepared(output)
    options = ModelOptions(embedding_dim=4, bottom_mlp=(4,), top_mlp=(8, 1))
    run = RunConfig(DataConfig(), options, LossConfig(), optimizer(), batch_size=64, eval_batch_size=32)
    split = dataset.splits["train"]
    scores = Evaluator(run, on_one_device(model, optimizer()), dataset).score(state, split)
    rows_of_split = scores.scored(first=len(split))
    np.testing.assert_allclose(rows_of_split.prob_R, offline, atol=1e-6)
    status, _, answer = server.ask("POST", "/v1/score", {"rows": rows[:64]})
    assert status == 200
    np.testing.assert_allclose(answer["probability"], rows_of_split.prob_R[:64], atol=1e-6)
    # Metrics: of training's evaluation, of the judge that `evaluate` asks, and of the program that was exported.
    of_training = scores.compute()
    of_judge = Measured(rows_of_split, Units.of_rows(len(split))).values()
    tables = of_arrays({name: np.asarray(table) for name, table in named_tables(model, state.tables)})
    arguments = (model, LossConfig(), state.dense_params, tables, dataset, "float32")
    of_export = export_model(tmp_path, *arguments, evaluated=("train",)).read_json("metrics.json")["train"]
    assert of_judge == pytest.approx({name: of_training[name] for name in of_judge}, abs=1e-6)
    assert of_export == pytest.approx(of_training, abs=1e-6)


def test_one_user_with_many_candidates(served):
    server, rows, _, _ = served
    user = {name: rows[3][name] for name in ("plain", "history", "colour")}
    candidates = [{name: value for name, value in row.items() if name not in user} for row in rows[:30]]
    status, _, answer = server.ask("POST", "/v1/score", {"shared": user, "rows": candidates})
    assert status == 200
    _, _, plain = server.ask("POST", "/v1/score", {"rows": [candidate | user for candidate in candidates]})
    assert answer["probability"] == plain["probability"] and len(answer["probability"]) == 30


def test_unknown_values_are_told_and_counted(served):
    server, rows, _, _ = served
    _, _, answer = server.ask("POST", "/v1/score", {"rows": [rows[1] | {"colour": "mauve"}]})
    assert answer["unknown"]["colour"] == 1
    status, _, text = server.ask("GET", "/metrics")
    assert status == 200
    for words in (
        'dlrm_unknown_values_total{feature="colour"}',
        'dlrm_stage_seconds_bucket{le="0.025",stage="compute"}',
        "dlrm_batch_rows_sum",
        "dlrm_queued_rows",
        "dlrm_model_version 1.0",
        'dlrm_responses_total{status="200"}',
    ):
        assert words in text.decode()


GOOD = {"name": "dense", "shape": [1, 6], "datatype": "FP32", "data": [0] * 6}
IDS = {"name": "ids", "shape": [1, 19], "datatype": "INT32", "data": [0] * 19}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/score", b"{", 400, "not JSON"),
        ("/v1/score", b"", 400, "not JSON"),
        ("/v1/score", b"\xff\xfe", 400, "not JSON"),
        ("/v1/score", b"[]", 400, "expected a JSON object"),
        ("/v1/score", b'{"rows": [{"plain": NaN}]}', 400, "not JSON"),
        ("/v1/score", b'{"rows": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "not JSON"),
        ("/v1/score", {"rows": 3}, 400, "rows is 3"),
        ("/v1/score", {"rows": [3]}, 400, "row 0 is 3"),
        ("/v1/score", {"rows": [{}]}, 400, "row 0: feature 'colour' is missing"),
        ("/v1/score", {"rows": [{}], "sharde": {}}, 400, "unknown field 'sharde'"),
        ("/v1/score", {"rows": [{}], "shared": 1}, 400, "shared is 1"),
        ("/v1/score", {"rows": [{}] * 65}, 400, "65 rows; at most 64"),
        ("/v1/score", {"rows": [{"plain": "é" * 300_000}]}, 413, "at most 200000"),
        ("/v2/models/log/infer", {}, 400, "inputs is None"),
        ("/v2/models/log/infer", {"inputs": [GOOD]}, 400, "tensor 'ids' is missing"),
        ("/v2/models/log/infer", {"inputs": [GOOD, GOOD]}, 400, "'dense' is given twice"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"name": "x"}]}, 400, "unknown tensor 'x'"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"datatype": "FP32"}]}, 400, "expected INT32 or INT64"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"shape": [1, -1]}]}, 400, "shape is [1, -1]"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"shape": [2**31, 19]}]}, 400, "shape is"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"shape": [1, 18]}]}, 400, "data has 19 numbers"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"data": [0.5] * 19}]}, 400, "0.5 is not an integer"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"data": [True] * 19}]}, 400, "True is not an integer"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"data": [2**63] * 19}]}, 400, "64 bits"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS | {"data": [10**6] * 19}]}, 400, "is outside table"),
        ("/v2/models/log/infer", {"inputs": [GOOD | {"data": [1e39] * 6}, IDS]}, 400, "is not a finite float32"),
        ("/v2/models/log/infer", {"inputs": [GOOD | {"data": ["a"] * 6}, IDS]}, 400, "'a' is not a number"),
        ("/v2/models/log/infer", {"inputs": [GOOD, IDS], "outputs": [{"name": "x"}]}, 400, "unknown tensor 'x'"),
        (
            "/v2/models/log/infer",
            {"inputs": [GOOD | {"parameters": {"binary_data_size": 24}}, IDS]},
            400,
            "binary_data_size",
        ),
        ("/v2/models/other/infer", {"inputs": [GOOD, IDS]}, 404, "no model 'other'"),
        ("/v2/models/log/versions/7/infer", {"inputs": [GOOD, IDS]}, 404, "version '7' is not loaded"),
        ("/v2/nothing", {}, 404, "no such path"),
    ],
)
def test_bad_input_is_the_clients_error_and_is_named(served, path, body, status, words):
    server, *_ = served
    headers = {"content-type": "application/json"} if isinstance(body, bytes) else None
    got, _, answer = server.ask("POST", path, body, headers)
    assert (got, words in answer["error"]) == (status, True), answer


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"content-type": "text/plain"}, 415, "Content-Type is 'text/plain'"),
        ({"content-encoding": "gzip"}, 415, "Content-Encoding is 'gzip'"),
        ({"inference-header-content-length": "9999"}, 400, "Inference-Header-Content-Length is '9999'"),
        ({"inference-header-content-length": "x"}, 400, "Inference-Header-Content-Length is 'x'"),
    ],
)
def test_wrong_headers_are_refused(served, headers, status, words):
    server, *_ = served
    got, _, answer = server.ask("POST", "/v2/models/log/infer", b"{}", headers)
    assert got == status and words in answer["error"]


def test_methods_are_told(served):
    status, headers, _ = served[0].ask("GET", "/v1/score")
    assert status == 405 and headers["allow"] == "POST"


def raw(server, data: bytes, half_close: bool = False) -> bytes:
    """What comes back for these bytes until the server closes, or three seconds pass."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=3) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := connection.recv(65536):
                answer += part
        return answer


def test_clients_that_are_slow_rude_or_gone_harm_nobody(served):
    server, rows, _, offline = served
    head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert b" 408 " in raw(server, head + b"content-length: 100\r\n\r\n{")  # The body never comes.
    assert b" 413 " in raw(server, head + b"content-length: 99999999\r\n\r\n{")
    assert b" 400 " in raw(server, b"NONSENSE\r\n\r\n")
    assert b" 431 " in raw(server, head + b"x: " + b"y" * 100_000)
    raw(server, head + b"content-length: 100\r\n\r\n{", half_close=True)
    raw(server, head + b"transfer-encoding: chunked\r\n\r\nzz\r\n")
    body = json.dumps({"rows": rows[:1]}).encode()
    whole = head + b"content-length: %d\r\n\r\n" % len(body) + body
    for _ in range(20):  # Gone before the answer.
        with socket.create_connection(("127.0.0.1", server.port), timeout=3) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(whole)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 9]), body[i : i + 9]) for i in range(0, len(body), 9))
    answer = raw(server, head + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["probability"][0] == pytest.approx(offline[0], abs=1e-6)


def test_the_page_and_the_description_are_there(served):
    server, *_ = served
    status, headers, text = server.ask("GET", "/")
    assert status == 200 and b"Score one row" in text and "default-src 'none'" in headers["content-security-policy"]
    _, _, api = server.ask("GET", "/openapi.json")
    assert "/v1/score" in api["paths"]
    _, _, status_json = server.ask("GET", "/status.json")
    assert status_json["model"]["name"] == "log" and status_json["recent"]["requests_per_second"] >= 0
    status, _, _ = server.ask("POST", "/v1/score", {"rows": [status_json["example"]]})
    assert status == 200


def test_a_new_version_takes_over_without_a_dropped_request(served, prepared, tmp_path):  # noqa: F811
    server, rows, trained, _ = served
    _, output, model_dir, model, _ = prepared
    before = digest(model_dir)
    stop = False

    def ask_on() -> list:
        found = []
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        body = json.dumps({"rows": rows[:3]})
        while not stop:
            connection.request("POST", "/v1/score", body, {"content-type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            found.append((response.status, answer.get("model_version"), tuple(answer.get("probability", ()))))
        connection.close()
        return found

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on) for _ in range(3)]
        try:
            state = lively_state(model, seed=5)
            tables = {name: np.asarray(table) for name, table in named_tables(model, state.tables)}
            dataset = open_prepared(output)
            args = (model, LossConfig(), state.dense_params, of_arrays(tables), dataset, "float32")
            assert export_model(model_dir, *args, evaluated=()).number == 2
            server.event("model_ready", version=2)
            time.sleep(0.3)
        finally:
            stop = True
        answers = [answer for task in asking for answer in task.result()]
    assert {status for status, *_ in answers} == {200}
    assert {version for _, version, _ in answers} == {"1", "2"}
    for version in (1, 2):
        want = load(model_dir, version, (1, 8, 64)).predict(trained.dense_RxN[:3], trained.ids_RxK[:3])
        for _, _, probability in [answer for answer in answers if answer[1] == str(version)]:
            np.testing.assert_allclose(probability, want, atol=1e-6)

    spoilt = shutil.copytree(model_dir / "2", tmp_path / "spoilt")
    (spoilt / "metrics.json").write_text("{}")
    spoilt.rename(model_dir / "3")
    assert "metrics.json has 2 bytes" in server.event("reload_refused", version=3)["reason"]
    export_tiny(model_dir, tiny_model())
    assert "schema differs" in server.event("reload_refused", version=4)["reason"]
    _, _, status = server.ask("GET", "/status.json")
    assert status["model"]["version"] == 2 and "4" in status["refused"]
    for number in (3, 4):
        shutil.rmtree(model_dir / str(number))
    after = digest(model_dir)
    assert before.items() <= after.items() and all(name in before or name.startswith("2/") for name in after)


def test_it_starts_with_the_newest_version_that_is_whole_and_scores_as_at_export(tmp_path):
    """Of four the newest is an empty directory, one is half copied, one scores otherwise; its copy's end is found."""
    export_tiny(tmp_path, tiny_model())
    noted = dict(np.load(tmp_path / "1" / "self_check.npz"))

    def other_scores(directory):
        shutil.copytree(tmp_path / "1", directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        np.savez(directory / "self_check.npz", **noted | {"probability": noted["probability"] + 0.1})

    assert write_version(tmp_path, other_scores, {}).number == 2
    export_tiny(tmp_path, tiny_model(), seed=1)
    metrics = tmp_path / "3" / "metrics.json"
    whole = metrics.read_bytes()
    metrics.unlink()
    (tmp_path / "7").mkdir()
    with running(tmp_path, "--batch_sizes=1", "--poll_seconds=0.2") as server:
        server.event("model_ready", version=1)
        for version, reason in ((7, "manifest.json is missing"), (3, "metrics.json is missing"), (2, "differ by 0.1")):
            assert reason in server.event("reload_refused", version=version)["reason"]
        assert server.ask("GET", "/status.json")[2]["refused"].keys() == {"2", "3", "7"}
        metrics.write_bytes(whole)
        server.event("model_ready", version=3)
        assert server.ask("GET", "/status.json")[2]["refused"].keys() == {"7"}
