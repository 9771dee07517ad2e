"""What makes embeddings of a model's states: the pooling that its files state, and the dense layers that they bring.

Dense layers stand in files of their own beside the model's weights; they are small and computed in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sensorium.checkpoint.pooling import DenseSpec, PoolingKind, read_pooling
from sensorium.errors import CheckpointError
from sensorium.pooling.pool import ACTIVATIONS
from sensorium.pooling.pooler import EmbedPooler, Pooler, TokenPooler
from sensorium.types import PoolingTask
from sensorium.weights.tensor_files import stored_tensors

_FILES = ("model.safetensors", "pytorch_model.bin")


class Dense(nn.Module):
    """One `Dense` module of sentence-transformers. Its tensors are buffers: not part of the model's own weights."""

    weight: Tensor  # float32 [out, in]
    bias: Tensor | None
    residual: Tensor | None  # [out, in]

    def __init__(self, spec: DenseSpec, in_features: int) -> None:
        super().__init__()
        tensors = _tensors(spec)
        self.out_features = tensors["linear.weight"].shape[0]
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (self.out_features, in_features)}
        if spec.bias:
            shapes["linear.bias"] = (self.out_features,)
        if spec.residual and self.out_features != in_features:
            shapes["residual.weight"] = (self.out_features, in_features)
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != shapes:
            raise CheckpointError(f"{spec.folder.name}: its weights are {found}, the modules before it need {shapes}")
        self.register_buffer("weight", tensors["linear.weight"], persistent=False)
        self.register_buffer("bias", tensors.get("linear.bias"), persistent=False)
        self.register_buffer("residual", tensors.get("residual.weight"), persistent=False)
        self.activation = ACTIVATIONS[spec.activation]
        self.adds_input = spec.residual

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> float32 [n, out]"""
        x = x.float()
        out = self.activation(nn.functional.linear(x, self.weight, self.bias))
        if not self.adds_input:
            return out
        return out + (x if self.residual is None else nn.functional.linear(x, self.residual))


def _tensors(spec: DenseSpec) -> dict[str, Tensor]:
    """Copies in float32, on the CPU also while a model is being declared on the meta device."""
    file = next((spec.folder / name for name in _FILES if (spec.folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{spec.folder.name}, which modules.json names, has no weights ({' or '.join(_FILES)})")
    with torch.device("cpu"):
        tensors = {}
        for stored in stored_tensors([file]):
            tensors[stored.key] = stored.view().to(torch.float32, copy=True)
            stored.release()
    if "linear.weight" not in tensors or tensors["linear.weight"].dim() != 2:
        raise CheckpointError(f"{spec.folder.name}/{file.name} has no matrix linear.weight")
    return tensors


def embedding_poolers(
    folder: Path, default: PoolingKind, size: int, wanted: str = "auto"
) -> tuple[dict[PoolingTask, Pooler], nn.Module]:
    """Poolers of a checkpoint with states of `size` numbers, and the layers that they use, to be kept by the model.

    `wanted` is --pooling.
    """
    spec = read_pooling(folder, default, wanted)
    width = size * len(spec.kinds)
    layers = []
    for one in spec.dense:
        layers.append(Dense(one, width))
        width = layers[-1].out_features
    dense = nn.Sequential(*layers)
    embed = EmbedPooler(spec.kinds, width, normalize=spec.normalize, head=dense if layers else None)
    return {"embed": embed, "token_embed": TokenPooler(size, normalize=spec.normalize)}, dense
