"""SigLIP's vision tower on images of any size (NaViT): slices flat and unpadded, attention inside each of them.

Source: Dehghani et al. 2023 (Patch n' Pack). A slice's lines and columns are spread over the table of positions that
the tower was trained with. Layers are CLIP's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium.errors import CheckpointError
from sensorium.models.base import Steps, finished
from sensorium.models.layers import declare
from sensorium.models.towers.blocks import MAX_ROWS, LayerNorm, PatchLinear
from sensorium.models.towers.clip import ClipConfig, ClipEncoder

SO400M: Mapping[str, Any] = {  # what configurations may leave out
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
MODEL_TYPES = ("siglip_vision_model", "siglip")


def siglip_config(vision: Mapping[str, Any]) -> ClipConfig:
    kind = vision.get("model_type", MODEL_TYPES[0])
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"config.json: vision tower {kind!r} is not supported (supported: {MODEL_TYPES[0]})")
    given = {name: value for name in SO400M if (value := vision.get(name)) is not None}
    return ClipConfig.of({**SO400M, **given})


class PositionTable(nn.Module):
    """A square of learnt positions."""

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = declare(side * side, hidden_size)
        self.side = side

    def ids(self, lines: int, columns: int) -> Tensor:
        """[lines * columns]: each patch gets the field of the square that its upper left corner falls into."""
        return (self._fields(lines).unsqueeze(1) * self.side + self._fields(columns)).flatten()

    def _fields(self, count: int) -> Tensor:
        # In float32 as in the published code: where a corner lies on a border, rounding decides.
        borders = torch.arange(1 / self.side, 1.0, 1 / self.side)
        corners = torch.arange(count, dtype=torch.float32) * (1 / torch.tensor(count, dtype=torch.float32))
        return torch.bucketize(corners, borders, right=True).clamp_(max=self.side - 1)

    def forward(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        ids = {grid: self.ids(*grid) for grid in set(grids)}
        places = torch.cat([ids[grid] for grid in grids])
        return functional.embedding(places.to(self.weight.device), self.weight)


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = PatchLinear(config.hidden_size, 3, patch, patch, bias=True)
        self.position_embedding = PositionTable(config.image_size // patch, config.hidden_size)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        rows: Tensor = self.patch_embedding(patches)
        return rows.add_(self.position_embedding(grids))


class SiglipTower(nn.Module):
    """Normalised patches [patches, 3 * side * side] of slices with these grids -> [patches, hidden]."""

    def __init__(self, config: ClipConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = ClipEncoder(config, num_layers)
        self.post_layernorm = LayerNorm(config.hidden_size, config.eps)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names, relative to the tower, that a checkpoint may have and this tower does not need."""
        layers = range(len(self.encoder.layers), self.config.num_layers)
        return ("head.", "embeddings.position_ids", *(f"encoder.layers.{index}." for index in layers))

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        return finished(self.steps(patches, grids))

    def steps(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Steps[Tensor]:
        yield patches.numel() * self.config.hidden_size
        x = self.embeddings(patches.to(self.post_layernorm.weight.dtype), grids)
        lengths = [lines * columns for lines, columns in grids]
        for layer in self.encoder.layers:
            x = yield from layer(x, lengths)
        out: Tensor = self.post_layernorm(x)
        return out

    def activation_bytes(self, element_size: int) -> int:
        """Of one group of slices."""
        config = self.config
        per_row = 9 * config.hidden_size + 3 * config.intermediate_size
        return MAX_ROWS * (element_size * per_row + (4 + element_size) * 3 * config.patch_size**2)
