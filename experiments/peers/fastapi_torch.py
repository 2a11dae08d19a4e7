"""What one writes without this project: FastAPI and PyTorch around the weights of an exported model.

`python experiments/peers/fastapi_torch.py MODEL_DIR PORT [THREADS]` answers the Open Inference Protocol's infer in JSON
and with binary tensors, one request at a time as it comes, and /status.json as far as dlrm_jax.loadtest asks for it.
Needs torch, fastapi, uvicorn, uvloop, httptools.
"""

import json
import pathlib
import sys

import fastapi
import numpy as np
import pydantic
import torch
import uvicorn
from fastapi import Request, Response


class DLRM(torch.nn.Module):
    """The exported float32 model with the dot interaction, one id a feature, in plain PyTorch."""

    def __init__(self, directory: pathlib.Path) -> None:
        super().__init__()
        arrays = json.loads((directory / "weights.json").read_text())
        self.signature = json.loads((directory / "signature.json").read_text())
        assert all(feature["hotness"] == 1 for feature in self.signature["features"])
        stack = next(facts for name, facts in arrays.items() if name.startswith("stack_"))
        files = dict(zip(stack["tables"], stack["files"], strict=True))
        self.tables = torch.nn.ModuleList(
            torch.nn.EmbeddingBag.from_pretrained(torch.from_numpy(np.load(directory / files[f["table"]])), mode="sum")
            for f in self.signature["features"]
        )
        read = lambda name: torch.from_numpy(np.load(directory / arrays[name]["files"][0]))  # noqa: E731
        self.bottom = self._mlp(arrays, "bottom_mlp", read, last_relu=True)
        self.top = self._mlp(arrays, "top_mlp", read, last_relu=False)
        count = len(self.tables) + 1
        self.rows, self.columns = (torch.tensor(x) for x in np.tril_indices(count, -1))

    def _mlp(self, arrays, name, read, last_relu):
        layers = []
        depth = sum(key.startswith(f"{name}/") and key.endswith("kernel") for key in arrays)
        for i in range(depth):
            kernel, bias = read(f"{name}/layer_{i}/kernel"), read(f"{name}/layer_{i}/bias")
            linear = torch.nn.Linear(*kernel.shape)
            linear.weight, linear.bias = torch.nn.Parameter(kernel.T.contiguous()), torch.nn.Parameter(bias)
            layers += [linear, torch.nn.ReLU()] if last_relu or i < depth - 1 else [linear]
        return torch.nn.Sequential(*layers)

    def forward(self, dense, ids):
        """(B, N), (B, F) to probabilities (B,)."""
        bottom = self.bottom(dense)
        vectors = [bottom] + [table(ids[:, i : i + 1]) for i, table in enumerate(self.tables)]
        stacked = torch.stack(vectors, dim=1)
        dots = torch.bmm(stacked, stacked.transpose(1, 2))[:, self.rows, self.columns]
        return torch.sigmoid(self.top(torch.cat([bottom, dots], dim=1)))[:, 0]


class Tensor(pydantic.BaseModel):
    """A tensor of a request."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float] | list[int] | None = None
    parameters: dict = {}


class Infer(pydantic.BaseModel):
    """A request."""

    inputs: list[Tensor]
    outputs: list[dict] = []


def make_app(model: DLRM) -> fastapi.FastAPI:
    """The application."""
    app = fastapi.FastAPI()
    signature = model.signature
    name = signature["name"]

    @app.get("/status.json")
    def status():
        return {"model": {"name": name, "dense": signature["dense_names"], "features": signature["features"]}}

    def score(dense, ids):
        with torch.inference_mode():
            return model(torch.from_numpy(dense), torch.from_numpy(ids)).numpy()

    @app.post(f"/v2/models/{name}/infer")
    async def infer(request: Request):
        body = await request.body()
        length = request.headers.get("inference-header-content-length")
        parsed = Infer.model_validate_json(body[: int(length)] if length else body)
        arrays, tail = {}, body[int(length) :] if length else b""
        for tensor in parsed.inputs:
            kind = np.float32 if tensor.datatype == "FP32" else np.int32
            if tensor.data is None:
                size = tensor.parameters["binary_data_size"]
                arrays[tensor.name], tail = np.frombuffer(tail[:size], kind).reshape(tensor.shape), tail[size:]
            else:
                arrays[tensor.name] = np.array(tensor.data, kind).reshape(tensor.shape)
        probability = score(arrays["dense"], arrays["ids"])
        output = {"name": "probability", "datatype": "FP32", "shape": list(probability.shape)}
        if length:
            output["parameters"] = {"binary_data_size": probability.nbytes}
            head = json.dumps({"model_name": name, "outputs": [output]}).encode()
            headers = {"inference-header-content-length": str(len(head))}
            return Response(head + probability.tobytes(), headers=headers, media_type="application/octet-stream")
        return {"model_name": name, "outputs": [output | {"data": probability.tolist()}]}

    return app


def main() -> None:
    """Serve the latest version of a model directory."""
    model_dir, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        torch.set_num_threads(int(sys.argv[3]))
    latest = max((path for path in model_dir.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    model = DLRM(latest).eval()
    uvicorn.run(make_app(model), host="127.0.0.1", port=port, log_level="warning", access_log=False, loop="uvloop")


if __name__ == "__main__":
    main()
