"""Pixtral's vision tower: Qwen2.5's layers without biases and windows, behind a norm, with rotary positions whose
frequencies take turns between lines and columns. Images keep their size; attention stays inside each of them.

Source: Agrawal et al. 2024 (Pixtral 12B). Patches come in blocks, as Qwen's do: attention does not see their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sensorium.checkpoint.values import number, positive_int
from sensorium.models.base import Rename, Steps
from sensorium.models.layers import MLP, Linear, RMSNorm
from sensorium.models.towers.blocks import activation, by_rows, hidden_state, weights
from sensorium.models.towers.qwen_vit import THETA, Merger, QwenVit, QwenVitConfig, Size, axial_theta

EPS = 1e-5
_LAYER, _BLOCK = "visual.transformer.layers.{n}", "visual.blocks.{n}"
PIXTRAL_MAP = (
    *(Rename(f"{_LAYER}.attention.{x}_proj.{{p}}", f"{_BLOCK}.attn.qkv.{{p}}", x) for x in "qkv"),
    Rename(f"{_LAYER}.attention.o_proj.{{p}}", f"{_BLOCK}.attn.proj.{{p}}"),
    *(Rename(f"{_LAYER}.feed_forward.{x}_proj.{{p}}", f"{_BLOCK}.mlp.gate_up_proj.{{p}}", x) for x in ("gate", "up")),
    Rename(f"{_LAYER}.feed_forward.down_proj.{{p}}", f"{_BLOCK}.mlp.down_proj.{{p}}"),
    Rename(f"{_LAYER}.attention_norm.{{p}}", f"{_BLOCK}.norm1.{{p}}"),
    Rename(f"{_LAYER}.ffn_norm.{{p}}", f"{_BLOCK}.norm2.{{p}}"),
    Rename("visual.patch_conv.{p}", "visual.patch_embed.proj.{p}"),
    Rename("multi_modal_projector.norm.{p}", "visual.merger.norm.{p}"),
    Rename("multi_modal_projector.patch_merger.merging_layer.{p}", "visual.merger.merging_layer.{p}"),
    Rename("multi_modal_projector.linear_1.{p}", "visual.merger.linear_1.{p}"),
    Rename("multi_modal_projector.linear_2.{p}", "visual.merger.linear_2.{p}"),
)


def pixtral_config(vision: Mapping[str, Any], merge: int, state: object) -> QwenVitConfig:
    """`vision_config` of Pixtral; defaults are transformers'. Layers after the hidden state that is used, `state` as
    `blocks.hidden_state` reads it, are not built."""
    given = {name: value for name, value in vision.items() if value is not None}
    return QwenVitConfig(
        depth=hidden_state(state, positive_int(given, "num_hidden_layers", 24)),
        embed_dim=positive_int(given, "hidden_size", 1024),
        num_heads=positive_int(given, "num_attention_heads", 16),
        intermediate_size=positive_int(given, "intermediate_size", 4096),
        patch_size=positive_int(given, "patch_size", 16),
        temporal_patch_size=1,
        spatial_merge_size=merge,
        hidden_act=str(given.get("hidden_act", "gelu")),
        theta=axial_theta(given, number(given, "rope_theta", THETA)),
        bias=False,
        eps=EPS,
    )


class PixtralProjector(Merger):
    """Mistral 3's: patches are normed, and those of a block merged channel by channel. Pixtral 12B has neither."""

    def __init__(self, config: QwenVitConfig, out_features: int, act: str, eps: float, *, bias: bool, merges: bool):
        super().__init__()
        size = config.embed_dim
        self.block = size * config.spatial_merge_size**2
        self.norm = RMSNorm(size, eps) if merges else None
        self.merging_layer = Linear(self.block, size, bias=False) if merges else None
        self.linear_1 = Linear(size, out_features, bias=bias)
        self.act = activation(act)
        self.linear_2 = Linear(out_features, out_features, bias=bias)
        self.size = size

    def forward(self, x: Tensor) -> Steps[Tensor]:
        return (yield from by_rows(self._merged, weights(self), x.view(-1, self.block)))

    def _merged(self, blocks: Tensor) -> Tensor:
        if self.norm is not None and self.merging_layer is not None:
            patches = self.norm(blocks.reshape(-1, self.size)).view(len(blocks), -1, self.size)
            blocks = self.merging_layer(patches.transpose(1, 2).reshape(len(blocks), -1))
        out: Tensor = self.linear_2(self.act(self.linear_1(blocks)))
        return out


class PixtralTower(QwenVit):
    def __init__(self, config: QwenVitConfig, out_features: int, projector: PixtralProjector) -> None:
        super().__init__(config, out_features, norm=RMSNorm, mlp=partial(MLP, bias=False), merger=projector)
        self.ln_pre = RMSNorm(config.embed_dim, EPS)

    def _placed(self, x: Tensor, sizes: Sequence[Size]) -> Steps[Tensor]:
        return (yield from by_rows(self.ln_pre, x.shape[1], x))

    def _angles(self, lines: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [patches, head_dim / 2]: every other frequency counts lines, those between them columns."""
        half = self.config.embed_dim // self.config.num_heads // 2
        inv_freq = self.config.theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
        places = self._places(lines, columns, device)
        angles = torch.cat([places[:, axis, None] * inv_freq[axis::2] for axis in (0, 1)], dim=1)
        return angles.cos(), angles.sin()
