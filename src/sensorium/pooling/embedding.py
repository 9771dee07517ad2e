"""What makes embeddings of a model's states: the pooling that its files state, and the dense layers that they bring.

Dense layers stand in files of their own beside the model's weights; they are small and computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sensorium.checkpoint.pooling import DenseSpec, PoolingKind, read_pooling
from sensorium.checkpoint.tokens import special_token, special_tokens
from sensorium.errors import CheckpointError
from sensorium.pooling.pool import ACTIVATIONS
from sensorium.pooling.pooler import EmbedPooler, Pooler, SparsePooler, TokenPooler, VectorsPooler
from sensorium.types import PoolingTask
from sensorium.weights.checkpoint_files import plain_tensors
from sensorium.weights.gguf import gguf_numbers

SPARSE_LINEAR, COLBERT_LINEAR = "sparse_linear.pt", "colbert_linear.pt"
_FILES = ("model.safetensors", "pytorch_model.bin")
_IN_GGUF = "*.weight.gguf"  # the model's file, by the name of the layer's tensor


class Dense(nn.Module):
    """A linear layer beside the model, as a `Dense` module of sentence-transformers is. Its tensors are buffers: not
    part of the model's own weights."""

    weight: Tensor  # float32 [out, in]
    bias: Tensor | None
    residual: Tensor | None  # [out, in]

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, activation: str = "identity", adds_input: bool = False
    ) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("residual", None, persistent=False)
        self.activation = ACTIVATIONS[activation]
        self.adds_input = adds_input

    @classmethod
    def of(cls, spec: DenseSpec, in_features: int) -> Dense:
        """A module that modules.json names. CheckpointError if its weights do not fit."""
        tensors = _tensors(spec)
        out_features = tensors["linear.weight"].shape[0]
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (out_features, in_features)}
        if spec.bias:
            shapes["linear.bias"] = (out_features,)
        if spec.residual and out_features != in_features:
            shapes["residual.weight"] = (out_features, in_features)
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != shapes:
            raise CheckpointError(f"{spec.folder.name}: its weights are {found}, the modules before it need {shapes}")
        made = cls(
            tensors["linear.weight"], tensors.get("linear.bias"), activation=spec.activation, adds_input=spec.residual
        )
        made.residual = tensors.get("residual.weight")
        return made

    @classmethod
    def of_file(cls, file: Path, in_features: int, out_features: int | None = None) -> Dense:
        """A torch file of one linear layer, with or without a bias."""
        tensors = _read(file)
        weight, bias = tensors.get("weight"), tensors.get("bias")
        fits = weight is not None and weight.dim() == 2 and weight.shape[1] == in_features
        if weight is None or not fits or weight.shape[0] != (out_features or weight.shape[0]):
            raise CheckpointError(
                f"{file.name} is not a linear layer of {in_features} numbers to {out_features or 'some'}"
            )
        if set(tensors) - {"weight", "bias"} or (bias is not None and bias.shape != weight.shape[:1]):
            raise CheckpointError(f"{file.name} has other tensors than a weight and its bias")
        return cls(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> float32 [n, out]"""
        x = x.float()
        out = self.activation(nn.functional.linear(x, self.weight, self.bias))
        if not self.adds_input:
            return out
        return out + (x if self.residual is None else nn.functional.linear(x, self.residual))


def stored_rows(files: Iterable[Path], *keys: str) -> int:
    """Rows of the matrix with one of these names, where no config says how many. CheckpointError if there is none."""
    stored = next((one for one in plain_tensors(files) if one.key in keys and len(one.shape) == 2), None)
    if stored is None:
        raise CheckpointError(f"the checkpoint has no matrix {' or '.join(keys)}, which makes the vectors of tokens")
    return stored.shape[0]


def _read(file: Path) -> dict[str, Tensor]:
    """Copies in float32, on the CPU also while a model is being declared on the meta device."""
    tensors = {}
    with torch.device("cpu"):
        for stored in plain_tensors([file]):
            tensors[stored.key] = stored.view().to(torch.float32, copy=True)
            stored.release()
    return tensors


def _tensors(spec: DenseSpec) -> dict[str, Tensor]:
    for named in spec.folder.glob(_IN_GGUF):
        with torch.device("cpu"):
            return {"linear.weight": gguf_numbers(named, named.stem)}
    file = next((spec.folder / name for name in _FILES if (spec.folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{spec.folder.name}, which modules.json names, has no weights ({' or '.join(_FILES)})")
    tensors = _read(file)
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
        layers.append(Dense.of(one, width))
        width = layers[-1].out_features
    dense = nn.Sequential(*layers)
    if spec.is_per_token:
        return {"token_embed": VectorsPooler(width, normalize=spec.normalize, head=dense if layers else None)}, dense
    poolers: dict[PoolingTask, Pooler] = {
        "embed": EmbedPooler(spec.kinds, width, normalize=spec.normalize, head=dense if layers else None),
        "token_embed": VectorsPooler(size, normalize=spec.normalize),
    }
    return poolers, dense


def several_outputs(
    folder: Path, size: int, tokenizer_config: dict[str, Any]
) -> tuple[dict[PoolingTask, Pooler], nn.Module]:
    """What BGE-M3's files add to its dense vectors: words with weights, and a vector of every token but the first."""
    poolers: dict[PoolingTask, Pooler] = {}
    layers = nn.ModuleDict()
    if (folder / SPARSE_LINEAR).is_file():
        layers["sparse"] = weights = Dense.of_file(folder / SPARSE_LINEAR, size, 1)
        named = (special_token(tokenizer_config, name) for name in ("cls", "eos", "pad", "unk"))
        texts = {text for text in named if text is not None}
        dropped = [one for one, text in special_tokens(folder, tokenizer_config) if text in texts]
        poolers["sparse"] = SparsePooler(weights, dropped)
        poolers["token_classify"] = TokenPooler(1, head=weights, activation="relu", skip=1, skip_last=1)
    if (folder / COLBERT_LINEAR).is_file():
        layers["colbert"] = vectors = Dense.of_file(folder / COLBERT_LINEAR, size)
        poolers["token_embed"] = VectorsPooler(vectors.out_features, normalize=True, head=vectors, skip=1)
    return poolers, layers
