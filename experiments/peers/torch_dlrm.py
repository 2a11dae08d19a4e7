"""DLRM in plain PyTorch, by the formulas of the reference's dlrm_s_pytorch.py: EmbeddingBag with sparse gradients.

Weights are taken from one of our states, so that both sides start equal. `compiled` steps run the dense model through
torch.compile; the bags and their sparse gradients stay eager, as torch.compile has nothing for them. It works where JAX
does: on the CPU, or on the first GPU.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.state import TrainState

TorchBatch = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]


def device_at_hand() -> torch.device:
    """Where JAX works too; exits where PyTorch cannot."""
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(f"JAX works on a {jax.default_backend()} here, PyTorch has none: install one with CUDA")
    return torch.device("cuda")


def mlp(layers: dict[str, dict[str, np.ndarray]], final_relu: bool) -> nn.Sequential:
    """Linear layers with our weights, ReLU between them."""
    modules: list[nn.Module] = []
    for i in range(len(layers)):
        kernel, bias = (torch.tensor(np.asarray(layers[f"layer_{i}"][name])) for name in ("kernel", "bias"))
        linear = nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = kernel.T.contiguous(), bias
        modules.append(linear)
        if final_relu or i < len(layers) - 1:
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


class DenseModel(nn.Module):
    """(dense_BxN, F pooled (B, D) tensors) -> logits_B."""

    def __init__(self, model: ModelConfig, state: TrainState) -> None:
        super().__init__()
        self.bottom = mlp(state.dense_params["bottom_mlp"], final_relu=True)
        self.top = mlp(state.dense_params["top_mlp"], final_relu=False)
        self.interaction = model.interaction.name
        vectors = len(model.features) + 1
        rows, columns = np.tril_indices(vectors, -1)
        self.register_buffer("rows", torch.tensor(rows))
        self.register_buffer("columns", torch.tensor(columns))

    def forward(self, dense_BxN: torch.Tensor, pooled: list[torch.Tensor]) -> torch.Tensor:
        """The reference's interact_features between its two MLPs."""
        bottom_BxD = self.bottom(dense_BxN)
        together_BxI = torch.cat([bottom_BxD, *pooled], dim=1)
        if self.interaction == "dot":
            vectors_BxVxD = together_BxI.view(len(dense_BxN), -1, bottom_BxD.shape[1])
            products_BxVxV = torch.bmm(vectors_BxVxD, vectors_BxVxD.transpose(1, 2))
            together_BxI = torch.cat([bottom_BxD, products_BxVxV[:, self.rows, self.columns]], dim=1)
        return self.top(together_BxI)[:, 0]


def loss_of(name: str, logits_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """The mean over a batch, of our loss of that name."""
    if name == "mse":
        return nn.functional.mse_loss(torch.sigmoid(logits_B), label_B)
    return nn.functional.binary_cross_entropy_with_logits(logits_B, label_B)


def dense_optimizer_of(optimizer: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own, for the MLPs."""
    rate = optimizer.schedule.learning_rate
    if optimizer.dense == "sgd":
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.Adagrad(parameters, lr=rate, eps=optimizer.eps)


class TorchDLRM:
    """The model with its optimizers; `train_step` and `forward` eager or compiled, on the same weights."""

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, loss: str, state: TrainState) -> None:
        self.config, self.loss, self.eps = model, loss, optimizer.eps
        self.rate = optimizer.schedule.learning_rate
        self.device = device_at_hand()
        torch.set_float32_matmul_precision("highest")
        self.bags = [
            nn.EmbeddingBag.from_pretrained(self._here(rows), freeze=False, mode="sum", sparse=True)
            for _, rows in named_tables(model, state.tables)
        ]
        self.dense = DenseModel(model, state).to(self.device)
        torch.compiler.reset()  # Or it counts the shapes of earlier configurations, and gives up compiling.
        self.compiled_dense = torch.compile(self.dense)
        self.dense_optimizer = dense_optimizer_of(optimizer, list(self.dense.parameters()))
        tables = [bag.weight for bag in self.bags]
        self.table_optimizer = torch.optim.SGD(tables, lr=self.rate) if optimizer.table == "sgd" else None
        self.means = [torch.zeros(len(table), device=self.device) for table in tables]

    def _here(self, array: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(array), device=self.device)

    def compute_as_jax_does(self) -> None:
        """Matrix products of a GPU in TF32, which is JAX's default there and not PyTorch's."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def batch(self, batch: Batch) -> TorchBatch:
        """One of our batches as tensors, ids as (B, hotness) int64 a feature."""
        starts = np.cumsum([0] + [feature.hotness for feature in self.config.features])
        ids = np.asarray(batch.ids_BxK, np.int64)
        columns = [self._here(ids[:, start:stop]) for start, stop in itertools.pairwise(starts)]
        return self._here(batch.dense_BxN), columns, self._here(batch.label_B)

    def logits(self, batch: TorchBatch, compiled: bool = False) -> torch.Tensor:
        """logits_B, with a graph for the way back where gradients are on."""
        dense_BxN, ids, _ = batch
        pooled = [bag(ids_Bxh) for bag, ids_Bxh in zip(self.bags, ids, strict=True)]
        return (self.compiled_dense if compiled else self.dense)(dense_BxN, pooled)

    def forward(self, batch: TorchBatch, compiled: bool = False) -> torch.Tensor:
        """logits_B for serving."""
        with torch.inference_mode():
            logits_B = self.logits(batch, compiled)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return logits_B

    def host(self, array: torch.Tensor) -> np.ndarray:
        """What `forward` returned, as NumPy has it."""
        return array.cpu().numpy()

    def train_step(self, batch: TorchBatch, compiled: bool = False) -> float:
        """One update of everything; returns the loss."""
        loss = loss_of(self.loss, self.logits(batch, compiled), batch[2])
        self.dense_optimizer.zero_grad()
        for bag in self.bags:
            bag.weight.grad = None
        loss.backward()
        self.dense_optimizer.step()
        if self.table_optimizer is not None:
            self.table_optimizer.step()
        else:
            self._rowwise_adagrad()
        return loss.item()

    @torch.no_grad()
    def _rowwise_adagrad(self) -> None:
        """As the reference's optim/rwsadagrad.py: repeated ids summed, then the row's mean square."""
        for bag, mean_V in zip(self.bags, self.means, strict=True):
            grad = bag.weight.grad.coalesce()
            ids_U, rows_UxD = grad.indices()[0], grad.values()
            mean_V.index_add_(0, ids_U, rows_UxD.square().mean(dim=1))
            scale_U = mean_V[ids_U].sqrt_().add_(self.eps)
            bag.weight.index_add_(0, ids_U, rows_UxD / scale_U[:, None], alpha=-self.rate)

    def tables(self) -> Iterator[np.ndarray]:
        """The tables' weights, in the model's order."""
        return (bag.weight.detach().cpu().numpy() for bag in self.bags)

    def dense_weights(self) -> dict[str, list[np.ndarray]]:
        """(in, out) kernels and biases, in order, by MLP."""
        return {
            name: [p.detach().cpu().numpy().T for p in getattr(self.dense, part).parameters()]
            for name, part in (("bottom_mlp", "bottom"), ("top_mlp", "top"))
        }
