"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: CLIP or SigLIP, a two-layer projector, and a Llama-like decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM
from sensorium.models.layers import declare
from sensorium.models.towers.blocks import Projector, separate, weights
from sensorium.models.towers.clip import ClipConfig, ClipTower, clip_map
from sensorium.types import Modality

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}  # meant where config.json has no vision_config at all


class Llava(DecoderForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    # Published, as transformers saves it today, and as 4.52 to 4.57 saved it; each with and without `vision_model.`.
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "model.vision_tower.vision_model.": "vision_tower.",
        "model.vision_tower.": "vision_tower.",
        "vision_tower.vision_model.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *clip_map("vision_tower"))

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._declare_media(checkpoint.config)
        unused = [f"vision_tower.{name}" for name in self.vision_tower.unused]
        self.ignored = (*self.ignored, ".embeddings.position_ids", *unused)

    def _declare_media(self, config: Mapping[str, Any]) -> None:
        """The tower, and what makes the decoder's rows of its states."""
        layers = config["vision_feature_layer"]
        states = layers if isinstance(layers, list) else [layers]
        self.vision_tower = ClipTower(
            ClipConfig.of(config.get("vision_config") or CLIP_LARGE),
            states,
            keeps_class_token=config.get("vision_feature_select_strategy", "default") == "full",
        )
        tower_size = self.vision_tower.config.hidden_size * len(states)
        self.multi_modal_projector: nn.Module = Projector(
            tower_size,
            self.text.hidden_size,
            self.text.hidden_size,
            config.get("projector_hidden_act", "gelu"),
            bias=config.get("multimodal_projector_bias", True),
        )

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        rows = yield from self._features(torch.stack([item["pixels"] for item in items]))
        return separate(rows.flatten(0, 1), [rows.shape[1]] * len(items))

    def _features(self, pixels: Tensor) -> Steps[Tensor]:
        """[n, 3, side, side] -> [n, rows, hidden]"""
        parts = []
        for batch in torch.split(pixels, self.vision_tower.group_size):
            states = yield from self.vision_tower.steps(batch)
            yield states[..., 0].numel() * weights(self.multi_modal_projector)
            parts.append(self.multi_modal_projector(states))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.vision_tower.activation_bytes(size))


class LlavaNext(Llava):
    weight_prefixes: ClassVar[Mapping[str, str]] = {**Llava.weight_prefixes, "model.image_newline": "image_newline"}

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if self.vision_tower.num_rows != self.vision_tower.config.num_patches:
            raise CheckpointError(
                "config.json: LLaVA-NeXT lays a row per patch on a grid: vision_feature_select_strategy must be "
                "'default' with CLIP, whose first row is of no patch, and 'full' with SigLIP, which has no such row"
            )
        self.image_newline = declare(self.text.hidden_size)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        pixels = [item["pixels"] for item in items]  # [tiles, 3, side, side]
        features = yield from self._features(pixels[0] if len(items) == 1 else torch.cat(pixels))
        parts = torch.split(features, [len(tiles) for tiles in pixels])
        return [self._pack(tiles, item["layout"].tolist()) for tiles, item in zip(parts, items, strict=True)]

    def _pack(self, tiles: Tensor, layout: list[int]) -> Tensor:
        """[tiles, rows, hidden], the whole image first, and the processor's layout -> the image's rows."""
        grid_h, grid_w, top, lines, left, columns, *size = layout
        hidden, side = tiles.shape[-1], int(tiles.shape[1] ** 0.5)
        grid = tiles[1:].view(grid_h, grid_w, side, side, hidden).permute(0, 2, 1, 3, 4)
        grid = grid.reshape(grid_h * side, grid_w * side, hidden)[top : top + lines, left : left + columns]
        if size != [lines, columns]:
            grid = resampled(grid[None], *size)[0]
        ended = torch.cat([grid, self.image_newline.expand(len(grid), 1, hidden)], dim=1)
        return torch.cat([tiles[0], ended.flatten(0, 1)])


class LlavaOnevision(LlavaNext):
    modalities = frozenset({"image", "video"})

    def _pack(self, tiles: Tensor, layout: list[int]) -> Tensor:
        """An image that is not cut ends with one such row."""
        return torch.cat([tiles[0], self.image_newline[None]]) if len(tiles) == 1 else super()._pack(tiles, layout)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """Of a video `pixels` [frames, 3, side, side]: a frame's rows become a quarter of them."""
        if kind != "video":
            return (yield from super().encoding(kind, items))
        pixels = [item["pixels"] for item in items]
        features = yield from self._features(pixels[0] if len(items) == 1 else torch.cat(pixels))
        frames, rows, hidden = features.shape
        side = math.isqrt(rows)
        smaller = resampled(features.view(frames, side, side, hidden), *[math.ceil(side / 2)] * 2)
        parts = torch.split(smaller.flatten(1, 2), [len(one) for one in pixels])
        return [torch.cat([part.flatten(0, 1), self.image_newline[None]]) for part in parts]


def resampled(grids: Tensor, lines: int, columns: int) -> Tensor:
    """[n, any, any, hidden] -> [n, lines, columns, hidden], between the nearest rows."""
    moved = functional.interpolate(grids.permute(0, 3, 1, 2), [lines, columns], mode="bilinear")
    return moved.permute(0, 2, 3, 1)
