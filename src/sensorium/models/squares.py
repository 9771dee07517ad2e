"""What models share whose images and frames come as squares of the tower's size, of which blocks of patches become
rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sensorium.models.base import Steps
from sensorium.models.decoder import DecoderForCausalLM
from sensorium.models.towers.blocks import merged_blocks, separate, weights
from sensorium.models.towers.clip import ClipTower
from sensorium.models.towers.intern_vit import InternVit
from sensorium.types import Modality


class SquaresModel(DecoderForCausalLM):
    """A family says `vision_model`, `side` (patches along an edge of a square), `merge` (of a block), and
    `multi_modal_projector`, which makes a row of a block's patches."""

    vision_model: ClipTower | InternVit
    multi_modal_projector: nn.Module
    side: int
    merge: int

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`pixels` [squares, 3, side, side] of each item."""
        pixels = [item["pixels"] for item in items]
        squares = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        parts = []
        for batch in torch.split(squares, self.vision_model.group_size):
            blocks = merged_blocks((yield from self.vision_model.steps(batch)), self.side, self.side, self.merge)
            yield blocks.shape[0] * blocks.shape[1] * weights(self.multi_modal_projector)
            parts.append(self.multi_modal_projector(blocks))
        rows = torch.cat(parts)
        return separate(rows.flatten(0, 1), [len(one) * rows.shape[1] for one in pixels])

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.vision_model.activation_bytes(size))
