"""PaddleOCR-VL: SigLIP's layers with learned and with rotary positions, blocks of patches through an MLP, and an ERNIE
4.5 decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import epsilon, positive_int, square
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.blocks import LayerNorm, by_rows
from sensorium.models.towers.qwen_vit import PatchMerger, QwenVit, QwenVitConfig, Size, axial_theta
from sensorium.models.towers.siglip import StretchedTable
from sensorium.types import Modality

NORM_EPS = 1e-5
_TOWER = "visual.vision_model."
_LAYER, _BLOCK = f"{_TOWER}encoder.layers.{{n}}.", "visual.blocks.{n}."
PADDLE_MAP = (
    *(Rename(f"{_LAYER}self_attn.{x}_proj.{{p}}", f"{_BLOCK}attn.qkv.{{p}}", x) for x in "qkv"),
    Rename(f"{_LAYER}self_attn.out_proj.{{p}}", f"{_BLOCK}attn.proj.{{p}}"),
    *(Rename(f"{_LAYER}layer_norm{x}.{{p}}", f"{_BLOCK}norm{x}.{{p}}") for x in "12"),
    *(Rename(f"{_LAYER}mlp.fc{x}.{{p}}", f"{_BLOCK}mlp.fc{x}.{{p}}") for x in "12"),
    Rename(f"{_TOWER}embeddings.patch_embedding.{{p}}", "visual.patch_embed.proj.{p}"),
    Rename(f"{_TOWER}embeddings.position_embedding.{{p}}", "visual.position_embedding.{p}"),
    Rename(f"{_TOWER}post_layernorm.{{p}}", "visual.merger.post_layernorm.{p}"),
    Rename("mlp_AR.pre_norm.{p}", "visual.merger.ln_q.{p}"),
    Rename("mlp_AR.linear_1.{p}", "visual.merger.mlp.0.{p}"),
    Rename("mlp_AR.linear_2.{p}", "visual.merger.mlp.2.{p}"),
)


class PaddleMerger(PatchMerger):
    """Behind the tower's last norm."""

    def __init__(self, config: QwenVitConfig, out_features: int) -> None:
        super().__init__(config, out_features, LayerNorm)
        self.post_layernorm = LayerNorm(config.embed_dim, config.eps)
        self.ln_q = LayerNorm(config.embed_dim, NORM_EPS)

    def _merged(self, blocks: Tensor) -> Tensor:
        patches = blocks.reshape(-1, self.post_layernorm.weight.shape[0])
        return super()._merged(self.post_layernorm(patches).view(blocks.shape))


class PaddleVit(QwenVit):
    def __init__(self, config: QwenVitConfig, out_features: int, side: int) -> None:
        super().__init__(config, out_features, patch_bias=True, merger=PaddleMerger(config, out_features))
        self.position_embedding = StretchedTable(side, config.embed_dim, is_averaged=False)

    def _placed(self, x: Tensor, sizes: Sequence[Size]) -> Steps[Tensor]:
        table = {size: self.position_embedding([size])[self._order_of(size, x.device)] for size in set(sizes)}
        return (yield from by_rows(torch.add, x.shape[1], x, torch.cat([table[size] for size in sizes])))

    def _order_of(self, size: Size, device: torch.device) -> Tensor:
        """Line by line, the place of each patch of the blocks' order."""
        lines, columns = self._places(*size, device).unbind(1)
        return lines * size[1] + columns


class PaddleOCRVL(Qwen2VL):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {**Qwen2VL.weight_prefixes, "model.projector.": "mlp_AR."}
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *PADDLE_MAP)

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        self.ignored = (*self.ignored, f"{_TOWER}head.", "packing_position_embedding.weight", "position_ids")
        vision: dict[str, Any] = checkpoint.config.get("vision_config") or {}
        config = QwenVitConfig(
            depth=positive_int(vision, "num_hidden_layers", 27),
            embed_dim=positive_int(vision, "hidden_size", 1152),
            num_heads=positive_int(vision, "num_attention_heads", 16),
            intermediate_size=positive_int(vision, "intermediate_size", 4304),
            patch_size=square(vision, "patch_size", 14),
            temporal_patch_size=1,
            spatial_merge_size=positive_int(vision, "spatial_merge_size", 2),
            hidden_act=str(vision.get("hidden_act") or "gelu_pytorch_tanh"),
            theta=axial_theta(vision),
            eps=epsilon(vision, "layer_norm_eps", 1e-6),
        )
        return PaddleVit(config, self.text.hidden_size, square(vision, "image_size", 384) // config.patch_size)
