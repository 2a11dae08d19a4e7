"""DLRM of TorchRec's own parts, over its FusedEmbeddingBagCollection: lookups and updates by FBGEMM's CPU kernels.

The rows' optimizer works within FBGEMM's backward pass, all tables in one call. Weights are taken from one of our
states, so that both sides start equal. TorchRec lists the pairs of the interaction in another order than we do, so the
rows of its first top layer lie in that order. Features of a shared table must stand together, as TorchRec lists them by
table. A batch's jagged ids are a new object each step, as those of a run are: what TorchRec keeps with them, as how
they split by feature, is made again.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torchrec.models.dlrm import DenseArch, InteractionArch, InteractionDCNArch, OverArch, SparseArch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.state import TrainState

from .torch_dlrm import dense_optimizer_of, loss_of

TorchRecBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""dense_BxN, the ids of all features one after the other, the (feature, example) bags' lengths, label_B."""

LAYER = ("kernel", "bias")


class Model(nn.Module):
    """What torchrec.models.dlrm.DLRM is made of, by either of our interactions: (dense_BxN, jagged ids) -> logits_B."""

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[feature.name for feature in model.features if feature.table == table.name],
            )
            for table in model.tables
        ]
        rule, settings = {
            "sgd": (torch.optim.SGD, {}),
            "rowwise_adagrad": (RowWiseAdagrad, {"eps": optimizer.eps}),
        }[optimizer.table]
        settings["lr"] = optimizer.schedule.learning_rate
        self.sparse = SparseArch(FusedEmbeddingBagCollection(tables, rule, settings))
        features = len(model.features)
        self.bottom = DenseArch(model.num_dense, list(model.bottom_mlp))
        width = model.embedding_dim
        if model.interaction.name == "dot":
            self.interaction: nn.Module = InteractionArch(features)
            joined = width + features * (features + 1) // 2
        else:
            # With nothing crossed it lays the vectors side by side.
            self.interaction, joined = InteractionDCNArch(features, nn.Identity()), width * (features + 1)
        self.top = OverArch(joined, list(model.top_mlp))

    def forward(self, dense_BxN: torch.Tensor, ids: KeyedJaggedTensor) -> torch.Tensor:
        """As DLRM's."""
        bottom_BxD = self.bottom(dense_BxN)
        return self.top(self.interaction(bottom_BxD, self.sparse(ids)))[:, 0]


class TorchRecDLRM:
    """The model with its optimizers, on the CPU."""

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, loss: str, state: TrainState) -> None:
        self.config, self.loss = model, loss
        self.keys = [feature.name for feature in model.features]
        self.rows = top_rows(model)
        self.model = Model(model, optimizer)
        with torch.no_grad():
            for name, rows in named_tables(model, state.tables):
                self._bags[name].weight.copy_(torch.from_numpy(np.array(rows)))
            for part, parameters in self._dense_parameters().items():
                layers = state.dense_params[part]
                arrays = [np.array(layers[f"layer_{i}"][name]) for i in range(len(layers)) for name in LAYER]
                if part == "top_mlp":
                    arrays[0] = arrays[0][self.rows]
                for parameter, array in zip(parameters, arrays, strict=True):
                    parameter.copy_(torch.from_numpy(array.T))
        dense = [parameter for part in self._dense_parameters().values() for parameter in part]
        self.dense_optimizer = dense_optimizer_of(optimizer, dense)

    @property
    def _bags(self) -> nn.ModuleDict:
        return self.model.sparse.embedding_bag_collection.embedding_bags

    def _dense_parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"bottom_mlp": list(self.model.bottom.parameters()), "top_mlp": list(self.model.top.parameters())}

    def batch(self, batch: Batch) -> TorchRecBatch:
        """One of our batches as tensors; empty slots are left out."""
        columns, start = [], 0
        ids_BxK = np.asarray(batch.ids_BxK)
        for feature in self.config.features:
            columns.append(ids_BxK[:, start : start + feature.hotness])
            start += feature.hotness
        values = np.concatenate([ids_Bxh[ids_Bxh >= 0] for ids_Bxh in columns])
        lengths = np.concatenate([(ids_Bxh >= 0).sum(axis=1, dtype=np.int32) for ids_Bxh in columns])
        dense_BxN, label_B = (torch.tensor(np.asarray(array)) for array in (batch.dense_BxN, batch.label_B))
        return dense_BxN, torch.from_numpy(values), torch.from_numpy(lengths), label_B

    def logits(self, batch: TorchRecBatch) -> torch.Tensor:
        """logits_B, with a graph for the way back where gradients are on."""
        dense_BxN, values, lengths, _ = batch
        return self.model(dense_BxN, KeyedJaggedTensor(self.keys, values, lengths=lengths))

    def forward(self, batch: TorchRecBatch) -> torch.Tensor:
        """logits_B for serving."""
        with torch.no_grad():  # FBGEMM has no lookup for CPUs in inference_mode.
            return self.logits(batch)

    def host(self, array: torch.Tensor) -> np.ndarray:
        """What `forward` returned, as NumPy has it."""
        return array.numpy()

    def train_step(self, batch: TorchRecBatch) -> float:
        """One update of everything; returns the loss."""
        loss = loss_of(self.loss, self.logits(batch), batch[3])
        self.dense_optimizer.zero_grad()
        loss.backward()  # Updates the tables too.
        self.dense_optimizer.step()
        return loss.item()

    def tables(self) -> Iterator[np.ndarray]:
        """The tables' weights, in the model's order."""
        return (self._bags[table.name].weight.detach().numpy() for table in self.config.tables)

    def dense_weights(self) -> dict[str, list[np.ndarray]]:
        """(in, out) kernels and biases, in order, by MLP; rows in our order."""
        weights = {part: [p.detach().numpy().T for p in found] for part, found in self._dense_parameters().items()}
        weights["top_mlp"][0] = weights["top_mlp"][0][np.argsort(self.rows)]
        return weights


def top_rows(model: ModelConfig) -> np.ndarray:
    """Which row of our first top layer belongs at each place of TorchRec's: its pairs are (0, 1), (0, 2), ..."""
    vectors, width = len(model.features) + 1, model.embedding_dim
    if model.interaction.name != "dot":
        return np.arange(vectors * width)
    first, second = np.triu_indices(vectors, 1)
    return np.concatenate([np.arange(width), width + second * (second - 1) // 2 + first])
