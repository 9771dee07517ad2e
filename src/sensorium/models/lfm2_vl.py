"""LFM2-VL: SigLIP 2 on tiles of any size, blocks of its patches through an MLP, and LFM2's decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int
from sensorium.models.base import Rename, Steps
from sensorium.models.lfm2 import LFM2_MAP, Lfm2ForCausalLM
from sensorium.models.llava import Llava
from sensorium.models.towers.blocks import Projector, merged_blocks, normalised, weights
from sensorium.models.towers.clip import clip_map
from sensorium.models.towers.siglip import Grid, SiglipTower, area, encoded_slices, grids_of, naflex_config
from sensorium.types import Modality

NORM_EPS = 1e-5  # torch's own


class Lfm2VL(Lfm2ForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    weight_prefixes: ClassVar[Mapping[str, str]] = Llava.weight_prefixes
    weight_map: ClassVar[tuple[Rename, ...]] = (*LFM2_MAP, *clip_map("vision_tower"))

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.config
        vision = naflex_config(config.get("vision_config") or {})
        self.vision_tower = SiglipTower(vision, vision.num_layers, is_naflex=True)
        self.merge = positive_int(config, "downsample_factor", 2)
        self.multi_modal_projector = Projector(
            vision.hidden_size * self.merge**2,
            positive_int(config, "projector_hidden_size", 2560),
            self.text.hidden_size,
            config.get("projector_hidden_act", "gelu"),
            bias=config.get("projector_bias", True),
            eps=NORM_EPS if config.get("projector_use_layernorm", True) else None,
        )
        self.ignored = (*self.ignored, *(f"vision_tower.{name}" for name in self.vision_tower.unused))

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`pixels` uint8 [patches, 3 * side * side] of each item, its `scale`, `shift` and its tiles' `grids`."""
        patches = []
        for item in items:
            yield item["pixels"].numel()
            patches.append(normalised(item, self.model.norm.weight.dtype))
        return (yield from encoded_slices(patches, [*map(grids_of, items)], self._encode, self._count, area))

    def _count(self, grid: Grid) -> int:
        return grid[0] * grid[1] // self.merge**2

    def _encode(self, patches: Tensor, grids: Sequence[Grid]) -> Steps[Tensor]:
        states = yield from self.vision_tower.steps(patches, grids)
        tiles = torch.split(states, [lines * columns for lines, columns in grids])
        blocks = [merged_blocks(one[None], *grid, self.merge)[0] for one, grid in zip(tiles, grids, strict=True)]
        yield sum(map(self._count, grids)) * weights(self.multi_modal_projector)
        rows: Tensor = self.multi_modal_projector(torch.cat(blocks))
        return rows

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.vision_tower.activation_bytes(size))
