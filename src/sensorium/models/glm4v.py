"""GLM-4.1V, GLM-4.5V and GLM-OCR: Qwen's patches through layers of their own, and GLM's decoders, of whose heads half
is rotated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP
from sensorium.models.layers import MLP, Linear, RMSNorm
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.blocks import LayerNorm, PatchLinear, by_rows, weights
from sensorium.models.towers.qwen3_vit import PositionTable
from sensorium.models.towers.qwen_vit import WINDOWED_VIT_MAP, Merger, QwenVit, QwenVitConfig, Size

NORM_EPS = 1e-5  # of the merger's norm: torch's own
_LAYER = "model.layers.{n}."

GLM_VIT_MAP = (
    *WINDOWED_VIT_MAP,
    Rename("visual.embeddings.position_embedding.{p}", "visual.position_embedding.{p}"),
    Rename("visual.post_layernorm.{p}", "visual.merger.post_layernorm.{p}"),
    Rename("visual.downsample.{p}", "visual.merger.downsample.{p}"),
    *(Rename(f"visual.merger.{x}_proj.{{p}}", "visual.merger.mlp.gate_up_proj.{p}", x) for x in ("gate", "up")),
    Rename("visual.merger.down_proj.{p}", "visual.merger.mlp.down_proj.{p}"),
)
SUBLAYER_MAP = (
    Rename(f"{_LAYER}post_self_attn_layernorm.{{p}}", f"{_LAYER}post_attention_layernorm.{{p}}"),
    Rename(f"{_LAYER}post_attention_layernorm.{{p}}", f"{_LAYER}pre_feedforward_layernorm.{{p}}"),
    Rename(f"{_LAYER}post_mlp_layernorm.{{p}}", f"{_LAYER}post_feedforward_layernorm.{{p}}"),
)


class GlmMerger(Merger):
    """A convolution makes one row of a block's normed patches, an MLP behind it."""

    def __init__(self, config: QwenVitConfig, out_features: int, inner: int, act: str) -> None:
        super().__init__()
        self.size, merge = config.embed_dim, config.spatial_merge_size
        self.block = self.size * merge**2
        self.post_layernorm = RMSNorm(self.size, config.eps)
        self.downsample = PatchLinear(out_features, self.size, merge, merge, bias=True)
        self.proj = Linear(out_features, out_features, bias=False)
        self.post_projection_norm = LayerNorm(out_features, NORM_EPS)
        self.mlp = MLP(out_features, inner, act, bias=False)

    def forward(self, x: Tensor) -> Steps[Tensor]:
        return (yield from by_rows(self._merged, weights(self), x.view(-1, self.block)))

    def _merged(self, blocks: Tensor) -> Tensor:
        patches = self.post_layernorm(blocks.reshape(-1, self.size)).view(len(blocks), -1, self.size)
        rows = self.proj(self.downsample(patches.transpose(1, 2).reshape(len(blocks), -1)))
        out: Tensor = self.mlp(functional.gelu(self.post_projection_norm(rows)))
        return out


class GlmVit(QwenVit):
    """Learned positions are sampled where the patches' centres lie on their square, between sixteen neighbours."""

    def __init__(self, config: QwenVitConfig, out_features: int, merger: Merger) -> None:
        mlp = partial(MLP, bias=config.bias)
        super().__init__(config, out_features, norm=RMSNorm, mlp=mlp, patch_bias=True, merger=merger)
        has_table = config.table_rows > 0
        self.post_conv_layernorm = RMSNorm(config.embed_dim, config.eps) if has_table else None
        self.position_embedding = PositionTable(config.table_rows, config.embed_dim) if has_table else None

    def _placed(self, x: Tensor, sizes: Sequence[Size]) -> Steps[Tensor]:
        if self.post_conv_layernorm is None or self.position_embedding is None:
            yield from ()
            return x
        x = yield from by_rows(self.post_conv_layernorm, x.shape[1], x)
        table = self.position_embedding
        square = table.weight.float().t().view(1, -1, table.side, table.side)
        found = {size: self._sampled(square, size) for size in dict.fromkeys(sizes)}
        yield 16 * x.numel()
        return x + torch.cat([found[size] for size in sizes]).to(x.dtype)

    def _sampled(self, square: Tensor, size: Size) -> Tensor:
        """float32 [patches, embed]"""
        centers = (self._places(*size, square.device).flip(1) + 0.5) / torch.tensor(size[::-1], device=square.device)
        grid = (centers * 2 - 1).view(1, -1, 1, 2)
        rows = functional.grid_sample(square, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return rows[0, :, :, 0].t()


class Glm4V(Qwen2VL):
    weight_map: ClassVar[tuple[Rename, ...]] = (*SUBLAYER_MAP, *DECODER_MAP, *GLM_VIT_MAP)
    is_ocr: ClassVar[bool] = False

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        last = self.text.num_layers  # the layers behind it predict several tokens
        self.ignored = (*self.ignored, *(f"model.layers.{index}." for index in (last, last + 1)))
        vision: Mapping[str, object] = checkpoint.config.get("vision_config") or {}
        config, out, inner = QwenVitConfig.of_glm(vision, is_ocr=self.is_ocr)
        return GlmVit(config, out, GlmMerger(config, out, inner, config.hidden_act))


class GlmOcr(Glm4V):
    is_ocr = True


class Glm4VMoe(Glm4V):
    weight_map = (*DECODER_MAP, *GLM_VIT_MAP)
