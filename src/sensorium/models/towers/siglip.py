"""SigLIP's vision tower on images of any size (NaViT): slices flat and unpadded, attention inside each of them.

Source: Dehghani et al. 2023 (Patch n' Pack). A slice's lines and columns are spread over the table of positions that
the tower was trained with. Layers are CLIP's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium.checkpoint.values import positive_int, square
from sensorium.errors import CheckpointError
from sensorium.models.base import Steps, finished
from sensorium.models.layers import declare
from sensorium.models.towers.blocks import MAX_ROWS, LayerNorm, PatchLinear, group_rows, groups, separate
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
NAFLEX: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
Grid = tuple[int, int]  # lines and columns of a slice's patches
Unit = TypeVar("Unit")


def siglip_config(vision: Mapping[str, Any]) -> ClipConfig:
    kind = vision.get("model_type", MODEL_TYPES[0])
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"config.json: vision tower {kind!r} is not supported (supported: {MODEL_TYPES[0]})")
    given = {name: value for name in SO400M if (value := vision.get(name)) is not None}
    return ClipConfig.of({**SO400M, **given})


def naflex_config(vision: Mapping[str, Any]) -> ClipConfig:
    """`vision_config` of SigLIP 2 for images of any size, whose table has a row for each of `num_patches`."""
    if (kind := vision.get("model_type", "siglip2_vision_model")) != "siglip2_vision_model":
        raise CheckpointError(f"config.json: vision tower {kind!r} is not supported (supported: siglip2_vision_model)")
    given = {name: value for name in NAFLEX if (value := vision.get(name)) is not None}
    patch, rows = square(vision, "patch_size", 16), positive_int(vision, "num_patches", 256)
    side = math.isqrt(rows)
    if side * side != rows:
        raise CheckpointError(f"config.json: vision_config num_patches {rows} is not the area of a square")
    return ClipConfig.of({**NAFLEX, **given, "patch_size": patch, "image_size": side * patch})


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

    def forward(self, grids: Sequence[Grid]) -> Tensor:
        ids = {grid: self.ids(*grid) for grid in set(grids)}
        places = torch.cat([ids[grid] for grid in grids])
        return functional.embedding(places.to(self.weight.device), self.weight)


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = PatchLinear(config.hidden_size, 3, patch, patch, bias=True)
        self.position_embedding = PositionTable(config.image_size // patch, config.hidden_size)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        rows: Tensor = self.patch_embedding(patches)
        return rows.add_(self.position_embedding(grids))


class StretchedTable(nn.Module):
    """A square of learnt positions, resampled to each slice's grid: linearly and, with `is_averaged` and where the grid
    is coarser, over all that a patch covers."""

    def __init__(self, side: int, hidden_size: int, *, is_averaged: bool = True) -> None:
        super().__init__()
        self.is_averaged = is_averaged
        self.weight = declare(side * side, hidden_size)
        self.side = side

    def _shares(self, count: int) -> Tensor:
        """float32 [count, side]: what each line (or column) of the table gives to those of a slice."""
        scale = self.side / count
        centers = (torch.arange(count, dtype=torch.float32, device=self.weight.device) + 0.5) * scale - 0.5
        places = torch.arange(self.side, dtype=torch.float32, device=self.weight.device)
        reach = max(scale, 1.0) if self.is_averaged else 1.0
        centers = centers.clamp_(0, self.side - 1) if reach == 1.0 else centers
        shares = (1 - (places - centers.unsqueeze(1)).abs_().div_(reach)).clamp_(min=0)
        return shares / shares.sum(1, keepdim=True)

    def _resampled(self, lines: int, columns: int) -> Tensor:
        """[lines * columns, hidden]"""
        table = self.weight.float().view(self.side, -1)
        rows = (self._shares(lines) @ table).view(lines, self.side, -1)
        return (self._shares(columns) @ rows).flatten(0, 1).to(self.weight.dtype)

    def forward(self, grids: Sequence[Grid]) -> Tensor:
        tables = {grid: self._resampled(*grid) for grid in set(grids)}
        return torch.cat([tables[grid] for grid in grids])


class NaflexEmbeddings(nn.Module):
    """Source: Tschannen et al. 2025 (SigLIP 2)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = PatchLinear(config.hidden_size, 3 * patch * patch, bias=True)
        self.position_embedding = StretchedTable(config.image_size // patch, config.hidden_size)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Patches have their channels one after the other; the weights have those of a pixel together."""
        turned = patches.view(len(patches), 3, -1).transpose(1, 2).flatten(1)
        rows: Tensor = self.patch_embedding(turned)
        return rows.add_(self.position_embedding(grids))


class SiglipTower(nn.Module):
    """Normalised patches [patches, 3 * side * side] of slices with these grids -> [patches, hidden]."""

    def __init__(self, config: ClipConfig, num_layers: int, *, is_naflex: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embeddings = NaflexEmbeddings(config) if is_naflex else SiglipEmbeddings(config)
        self.encoder = ClipEncoder(config, num_layers)
        self.post_layernorm = LayerNorm(config.hidden_size, config.eps)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names, relative to the tower, that a checkpoint may have and this tower does not need."""
        layers = range(len(self.encoder.layers), self.config.num_layers)
        return ("head.", "embeddings.position_ids", *(f"encoder.layers.{index}." for index in layers))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        return finished(self.steps(patches, grids))

    def steps(self, patches: Tensor, grids: Sequence[Grid]) -> Steps[Tensor]:
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


def area(grid: Grid) -> int:
    return grid[0] * grid[1]


def encoded_slices(
    patches: Sequence[Tensor],
    units: Sequence[Sequence[Unit]],
    encode: Callable[[Tensor, Sequence[Unit]], Steps[Tensor]],
    count: Callable[[Unit], int],
    size: Callable[[Unit], int],
) -> Steps[list[Tensor]]:
    """Rows of each item, out of its patches [n, …] and its units, which are slices' grids or what else is encoded as
    one. A unit has `size(unit)` patches and gives `count(unit)` rows; `encode` makes rows of a group of units."""
    lengths = [[*map(size, one)] for one in units]
    slices = [part for one, each in zip(patches, lengths, strict=True) for part in torch.split(one, each)]
    every = [unit for one in units for unit in one]
    rows = []
    for group in groups([length for each in lengths for length in each], group_rows(slices[0])):
        rows.append((yield from encode(torch.cat(slices[group]), every[group])))
    return separate(torch.cat(rows), [sum(map(count, one)) for one in units])


def grids_of(item: Mapping[str, Tensor]) -> list[Grid]:
    """An item's `grids` int32 [slices, 2]."""
    return [(int(lines), int(columns)) for lines, columns in item["grids"].tolist()]
