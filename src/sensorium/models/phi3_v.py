"""Phi-3-vision, Phi-3.5-vision and VLM2Vec: CLIP, rows of merged tiles with learnt separators, and a Phi-3 decoder.

config.json does not describe the tower: where it has no `img_processor.vision_config`, the shapes of the stored tensors
do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM
from sensorium.models.layers import Linear, declare
from sensorium.models.towers.blocks import MAX_ROWS, by_rows, separate, weights
from sensorium.models.towers.clip import ClipConfig, ClipTower, clip_map
from sensorium.types import Modality
from sensorium.weights.checkpoint_files import plain_tensors

TILE = 336  # pixels, what the processor cuts where config.json says nothing
HEAD_DIM = 64  # of every CLIP tower
MOST_CROPS = 16  # that people ask for
Choices = Mapping[str, tuple[Any, ...]]  # what can be served of each key of config.json, the default first
EMBEDDING: Choices = {
    "hd_transform_order": ("glb_sub", "sub_glb"),
    "projection_cls": ("mlp",),
    "use_hd_transform": (True,),
    "with_learnable_separator": (True,),
}
IMAGES: Choices = {"name": ("clip_vision_model",), "type_feature": ("patch",)}
_PREFIX = re.compile(r"model\.vision_embed_tokens\.img_processor\.(?:vision_model\.)?")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


class VisionEmbedding(nn.Module):
    """Tiles [n, 3, side, side] of each image, the whole image first, and their grid -> the image's rows."""

    def __init__(self, tower: ClipTower, hidden_size: int, *, global_first: bool) -> None:
        super().__init__()
        block = 4 * tower.config.hidden_size  # two by two patches side by side
        self.img_processor = tower
        self.glb_GN = declare(1, 1, block)  # between the tiles and the whole image
        self.sub_GN = declare(1, 1, 1, block)  # ends every line
        self.img_projection = nn.ModuleDict(
            {"0": Linear(block, hidden_size, bias=True), "2": Linear(hidden_size, hidden_size, bias=True)}
        )
        self._global_first = global_first

    def steps(self, images: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Steps[list[Tensor]]:
        tiles = images[0] if len(images) == 1 else torch.cat(list(images))
        states = []
        for group in torch.split(tiles, self.img_processor.group_size):
            states.append((yield from self.img_processor.steps(group)))
        features = torch.split(torch.cat(states), list(map(len, images)))
        packed = [self._packed(part, grid) for part, grid in zip(features, grids, strict=True)]
        rows = yield from by_rows(self._projected, weights(self.img_projection), torch.cat(packed))
        return separate(rows, [len(part) for part in packed])

    def _projected(self, rows: Tensor) -> Tensor:
        out: Tensor = self.img_projection["2"](functional.gelu(self.img_projection["0"](rows)))
        return out

    def _packed(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[1 + high * wide, patches, hidden] -> [rows, 4 * hidden]"""
        whole, tiles = self._lines(features[:1], (1, 1)), self._lines(features[1:], grid)
        first, last = (whole, tiles) if self._global_first else (tiles, whole)
        return torch.cat([first, self.glb_GN.view(1, -1), last])

    def _lines(self, tiles: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tiles in their places, two by two patches merged, and a separator behind every line."""
        (high, wide), half, hidden = grid, round(tiles.shape[1] ** 0.5) // 2, tiles.shape[2]
        blocks = tiles.reshape(high, wide, half, 2, half, 2, hidden).permute(0, 2, 1, 4, 3, 5, 6)
        lines = blocks.reshape(high * half, wide * half, 4 * hidden)
        ends = self.sub_GN.view(1, 1, -1).expand(len(lines), 1, -1)
        return torch.cat([lines, ends], dim=1).flatten(0, 1)


class Phi3V(DecoderForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "model.vision_embed_tokens.img_processor.vision_model.": "vision_embed_tokens.img_processor.",
        "model.vision_embed_tokens.": "vision_embed_tokens.",
    }
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *clip_map("vision_embed_tokens.img_processor"))

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        embedding = supported(checkpoint.config, "embd_layer", EMBEDDING)
        supported(checkpoint.config, "img_processor", IMAGES)
        vision = checkpoint.config.get("img_processor") or {}
        config = ClipConfig.of(vision["vision_config"]) if vision.get("vision_config") else stored_config(checkpoint)
        tower = ClipTower(config, [vision.get("layer_idx", -2)], keeps_class_token=False)
        self.vision_embed_tokens = VisionEmbedding(
            tower, self.text.hidden_size, global_first=embedding["hd_transform_order"] == "glb_sub"
        )
        unused = [f"vision_embed_tokens.img_processor.{name}" for name in tower.unused]
        self.ignored = (*self.ignored, ".embeddings.position_ids", "vision_embed_tokens.wte.", *unused)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        grids = [(int(high), int(wide)) for high, wide in (item["grid"].tolist() for item in items)]
        return (yield from self.vision_embed_tokens.steps([item["pixels"] for item in items], grids))

    def activation_bytes(self, tokens: int) -> int:
        size, tower = self.model.norm.weight.element_size(), self.vision_embed_tokens.img_processor
        tiles = 1 + max(MOST_CROPS, int(self.checkpoint.preprocessor.get("num_crops") or 1))
        features = 3 * tiles * tower.config.num_patches * tower.config.hidden_size  # held three times
        projected = MAX_ROWS * 4 * self.text.hidden_size
        return max(super().activation_bytes(tokens), tower.activation_bytes(size) + size * (features + projected))


def supported(config: Mapping[str, Any], part: str, choices: Choices) -> dict[str, Any]:
    """The values of one part of config.json, defaults filled in, if all of them can be served."""
    given = config.get(part) or {}
    found = {name: given.get(name, values[0]) for name, values in choices.items()}
    for name, value in found.items():
        if value not in choices[name]:
            raise CheckpointError(f"config.json: {part}.{name} {value!r} is not supported")
    return found


def stored_config(checkpoint: Checkpoint) -> ClipConfig:
    """The tower as the shapes of its tensors have it; heads are 64 wide in every CLIP."""
    shapes = {
        _PREFIX.sub("", tensor.key): tensor.shape
        for tensor in plain_tensors(checkpoint.weight_files)
        if _PREFIX.match(tensor.key)
    }
    try:
        hidden_size, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
        positions, _ = shapes["embeddings.position_embedding.weight"]
        intermediate_size, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        raise CheckpointError("there is no CLIP tower under model.vision_embed_tokens.img_processor") from None
    layers = {int(match.group(1)) for key in shapes if (match := _LAYER.match(key))}
    image_size = round((positions - 1) ** 0.5) * patch_size
    if image_size != TILE:
        raise CheckpointError(
            f"the vision tower takes images of {image_size} pixels instead of {TILE}; config.json "
            "must say so in img_processor.vision_config"
        )
    return ClipConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=len(layers),
        num_heads=max(1, hidden_size // HEAD_DIM),
        image_size=image_size,
        patch_size=patch_size,
    )
