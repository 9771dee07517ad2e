"""Qwen3-VL's vision tower: Qwen2-VL's with a table of learned positions, resampled to each image's grid, and with
mergers behind some of its layers. What these give is for the decoder's first layers ("deepstack")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sensorium.errors import CheckpointError
from sensorium.models.base import Rename, Steps
from sensorium.models.layers import declare
from sensorium.models.towers.blocks import LayerNorm, by_rows
from sensorium.models.towers.qwen_vit import QWEN_VIT_MAP, PatchMerger, QwenVit, QwenVitConfig, Size

QWEN3_VIT_MAP = (
    *QWEN_VIT_MAP,
    Rename("visual.blocks.{n}.mlp.linear_fc1.{p}", "visual.blocks.{n}.mlp.fc1.{p}"),
    Rename("visual.blocks.{n}.mlp.linear_fc2.{p}", "visual.blocks.{n}.mlp.fc2.{p}"),
    Rename("visual.merger.norm.{p}", "visual.merger.ln_q.{p}"),
    Rename("visual.merger.linear_fc1.{p}", "visual.merger.mlp.0.{p}"),
    Rename("visual.merger.linear_fc2.{p}", "visual.merger.mlp.2.{p}"),
    Rename("visual.deepstack_merger_list.{n}.norm.{p}", "visual.deepstack_merger_list.{n}.ln_q.{p}"),
    Rename("visual.deepstack_merger_list.{n}.linear_fc1.{p}", "visual.deepstack_merger_list.{n}.mlp.0.{p}"),
    Rename("visual.deepstack_merger_list.{n}.linear_fc2.{p}", "visual.deepstack_merger_list.{n}.mlp.2.{p}"),
)


class PositionTable(nn.Module):
    """A square table of learned positions; rows that do not fill another line are never read."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.side = math.isqrt(rows)
        self.weight = declare(rows, size)

    def forward(self, places: Tensor, last: Tensor) -> Tensor:
        """Patches' lines and columns and the last ones of their slice (both int64 [patches, 2]) -> float32
        [patches, size], between the four nearest entries: the slice's edges lie on the table's."""
        coordinates = places.float() * (self.side - 1) / last.clamp(min=1)
        low = coordinates.long()
        share = coordinates - low
        high = (low + 1).clamp(max=self.side - 1)
        out = torch.zeros(len(places), self.weight.shape[1], device=places.device)
        for lines, of_lines in ((low, 1 - share), (high, share)):
            for columns, of_columns in ((low, 1 - share), (high, share)):
                entries = self.weight[lines[:, 0] * self.side + columns[:, 1]].float()
                out.addcmul_(entries, (of_lines[:, 0] * of_columns[:, 1]).unsqueeze(1))
        return out


class Qwen3Vit(QwenVit):
    """Rows [blocks, (1 + tapped layers) * out_features]: of the last layer, then of the tapped ones as they come."""

    def __init__(self, config: QwenVitConfig, out_features: int) -> None:
        super().__init__(config, out_features, patch_bias=True)
        if not all(0 <= layer < config.depth for layer in config.tapped_layers):
            layers = list(config.tapped_layers)
            raise CheckpointError(f"config.json: deepstack_visual_indexes {layers} must be of {config.depth} layers")
        self.pos_embed = PositionTable(config.table_rows, config.embed_dim)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, out_features, LayerNorm, by_blocks=True) for _ in config.tapped_layers
        )

    def _placed(self, x: Tensor, sizes: Sequence[Size]) -> Steps[Tensor]:
        slices = [self._places(*size, x.device) for size in sizes]
        places, last = torch.cat(slices), torch.cat([one[-1:].expand_as(one) for one in slices])

        def added(rows: Tensor, places: Tensor, last: Tensor) -> Tensor:
            return rows.add(self.pos_embed(places, last).to(rows.dtype))

        placed: Tensor = yield from by_rows(added, 4 * x.shape[1], x, places, last)
        return placed

    def _rows(self, x: Tensor, cos: Tensor, sin: Tensor, slices: list[int], windows: list[int]) -> Steps[Tensor]:
        tapped = []
        for index, block in enumerate(self.blocks):
            x = yield from block(x, cos, sin, slices)
            if index in self.config.tapped_layers:
                merger = self.deepstack_merger_list[self.config.tapped_layers.index(index)]
                tapped.append((yield from merger(x)))
        rows = yield from self.merger(x)
        return torch.cat([rows, *tapped], dim=1)
