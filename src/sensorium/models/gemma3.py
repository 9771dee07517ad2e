"""Gemma 3 with images: SigLIP, averages of its patches, and a decoder that sees an image's rows in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM
from sensorium.models.layers import RMSNorm, declare
from sensorium.models.llava import Llava
from sensorium.models.towers.blocks import separate
from sensorium.models.towers.clip import ClipConfig, ClipTower, clip_map
from sensorium.types import Modality


class Projector(nn.Module):
    """Patches of squares [n, side * side, vision] -> means of `kernel` x `kernel` of them [n, rows, hidden]."""

    def __init__(self, config: ClipConfig, hidden_size: int, tokens: int) -> None:
        super().__init__()
        self.mm_input_projection_weight = declare(config.hidden_size, hidden_size)
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.eps, 1.0)
        self.side = config.image_size // config.patch_size
        self.rows = int(tokens**0.5)
        self.kernel = self.side // self.rows

    def forward(self, patches: Tensor) -> Tensor:
        count, _, size = patches.shape
        used = self.rows * self.kernel
        grid = patches.view(count, self.side, self.side, size)[:, :used, :used]
        cells = grid.reshape(count, self.rows, self.kernel, self.rows, self.kernel, size)
        means = cells.mean(dim=(2, 4)).view(count, self.rows**2, size)
        out: Tensor = self.mm_soft_emb_norm(means) @ self.mm_input_projection_weight
        return out


class Gemma3(DecoderForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    weight_prefixes: ClassVar[Mapping[str, str]] = Llava.weight_prefixes
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *clip_map("vision_tower"))

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.config
        vision = ClipConfig.of({"model_type": "siglip_vision_model", **(config.get("vision_config") or {})})
        self.vision_tower = ClipTower(vision, [-1], keeps_class_token=True, ends_with_norm=True)
        tokens = positive_int(config, "mm_tokens_per_image", 256)
        self.multi_modal_projector = Projector(vision, self.text.hidden_size, tokens)
        unused = [f"vision_tower.{name}" for name in self.vision_tower.unused]
        self.ignored = (*self.ignored, ".embeddings.position_ids", *unused)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`pixels` [squares, 3, side, side] of each image."""
        pixels = [item["pixels"] for item in items]
        parts = []
        for batch in torch.split(torch.cat(pixels), self.vision_tower.group_size):
            states = yield from self.vision_tower.steps(batch)
            yield states.numel() * self.text.hidden_size // self.multi_modal_projector.kernel**2
            parts.append(self.multi_modal_projector(states))
        rows = torch.cat(parts)
        return separate(rows.flatten(0, 1), [len(one) * rows.shape[1] for one in pixels])

    def logits(self, hidden: Tensor) -> Tensor:
        """Without the cap on logits that the text-only class has: transformers knows none here."""
        out: Tensor = self.lm_head(hidden)
        return out

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.vision_tower.activation_bytes(size))
