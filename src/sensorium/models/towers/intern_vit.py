"""InternViT: a ViT on squares with a class token, learned positions and a scale behind attention and MLP.

Source: Chen et al. 2024 (InternVL). The 300M model has layer norms, the 6B one RMS norms and norms of q and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sensorium.checkpoint.values import epsilon, positive_int, unsupported
from sensorium.models.base import Rename, Steps
from sensorium.models.layers import Linear, QKVLinear, RMSNorm, declare
from sensorium.models.towers.blocks import (
    LayerNorm,
    Mlp,
    PatchLinear,
    attention,
    by_rows,
    group_rows,
    square_patches,
    weights,
)

QK_EPS = 1e-6
_LAYER = "vision_model.encoder.layer.{n}"
_OURS = "vision_model.encoder.layers.{n}"
INTERN_VIT_MAP = (  # as transformers names them; the published names are the module's
    *(Rename(f"{_LAYER}.attention.{x}_proj.{{p}}", f"{_OURS}.attn.qkv.{{p}}", x) for x in "qkv"),
    Rename(f"{_LAYER}.attention.projection_layer.{{p}}", f"{_OURS}.attn.proj.{{p}}"),
    Rename(f"{_LAYER}.attention.q_norm.{{p}}", f"{_OURS}.attn.q_norm.{{p}}"),
    Rename(f"{_LAYER}.attention.k_norm.{{p}}", f"{_OURS}.attn.k_norm.{{p}}"),
    Rename(f"{_LAYER}.layernorm_before.{{p}}", f"{_OURS}.norm1.{{p}}"),
    Rename(f"{_LAYER}.layernorm_after.{{p}}", f"{_OURS}.norm2.{{p}}"),
    Rename(f"{_LAYER}.lambda_1", f"{_OURS}.ls1"),
    Rename(f"{_LAYER}.lambda_2", f"{_OURS}.ls2"),
    Rename(f"{_LAYER}.mlp.{{f}}.{{p}}", f"{_OURS}.mlp.{{f}}.{{p}}"),
    Rename("vision_model.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    Rename("vision_model.embeddings.patch_embeddings.projection.{p}", "vision_model.embeddings.patch_embedding.{p}"),
    Rename("vision_model.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
)


@dataclass(frozen=True, slots=True)
class InternVitConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    side: int  # patches along an edge of a square
    patch_size: int
    hidden_act: str
    eps: float
    qkv_bias: bool
    qk_norm: bool
    has_rms_norms: bool
    ends_with_norm: bool

    @classmethod
    def of(cls, vision: Mapping[str, Any], image_size: int, patch_size: int) -> InternVitConfig:
        """`vision_config` in either dialect; transformers' defaults."""
        norm = vision.get("norm_type") or "layer_norm"
        if norm not in ("layer_norm", "rms_norm"):
            raise unsupported("vision_config norm_type", norm, ("layer_norm", "rms_norm"))
        return cls(
            depth=positive_int(vision, "num_hidden_layers", 24),
            hidden_size=positive_int(vision, "hidden_size", 1024),
            intermediate_size=positive_int(vision, "intermediate_size", 4096),
            num_heads=positive_int(vision, "num_attention_heads", 16),
            side=image_size // patch_size,
            patch_size=patch_size,
            hidden_act=str(vision.get("hidden_act") or "gelu"),
            eps=epsilon(vision, "layer_norm_eps", 1e-6),
            qkv_bias=bool(vision.get("qkv_bias", vision.get("attention_bias", False))),
            qk_norm=bool(vision.get("qk_normalization", vision.get("use_qk_norm", False))),
            has_rms_norms=norm == "rms_norm",
            ends_with_norm=vision.get("use_mean_pooling") is False,
        )

    @property
    def num_positions(self) -> int:
        return self.side**2 + 1


class Embeddings(nn.Module):
    """Pixels [n, 3, side, side] -> [n, positions, hidden], the class token first."""

    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.class_embedding = declare(1, 1, config.hidden_size)
        self.patch_embedding = PatchLinear(config.hidden_size, 3, self.patch, self.patch, bias=True)
        self.position_embedding = declare(1, config.num_positions, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = self.patch_embedding(square_patches(pixels, self.patch))
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, rows], dim=1).add_(self.position_embedding)


class InternAttention(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_heads
        self.head_dim = size // self.num_heads
        self.qkv = QKVLinear(size, self.num_heads, self.num_heads, self.head_dim, bias=config.qkv_bias)
        self.proj = Linear(size, size, bias=True)
        self.q_norm = RMSNorm(size, QK_EPS) if config.qk_norm else None
        self.k_norm = RMSNorm(size, QK_EPS) if config.qk_norm else None

    def projected(self, x: Tensor) -> Tensor:
        """[rows, 3 * hidden]: q and k are normed over all of their heads."""
        qkv: Tensor = self.qkv(x)
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = qkv.chunk(3, dim=1)
        return torch.cat([self.q_norm(q.contiguous()), self.k_norm(k.contiguous()), v], dim=1)


class InternLayer(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        norm = RMSNorm if config.has_rms_norms else LayerNorm
        self.attn = InternAttention(config)
        self.norm1 = norm(config.hidden_size, config.eps)
        self.norm2 = norm(config.hidden_size, config.eps)
        self.ls1 = declare(config.hidden_size)
        self.ls2 = declare(config.hidden_size)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, lengths: list[int]) -> Steps[Tensor]:
        heads = self.attn
        qkv = yield from by_rows(lambda rows: heads.projected(self.norm1(rows)), weights(heads.qkv), x)
        q, k, v = qkv.view(len(x), 3, heads.num_heads, heads.head_dim).unbind(1)
        attended = yield from attention(q, k, v, lengths, heads.head_dim**-0.5)
        return (yield from by_rows(self._rest, weights(heads.proj, self.mlp), x, attended.reshape(len(x), -1)))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = torch.addcmul(x, self.attn.proj(attended), self.ls1)
        x.addcmul_(self.mlp(self.norm2(x)), self.ls2)
        return x


class Encoder(nn.Module):
    def __init__(self, config: InternVitConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InternLayer(config) for _ in range(layers))


class InternVit(nn.Module):
    """Pixels [n, 3, side, side] -> the patches' states [n, side * side, hidden] after `layers` layers."""

    def __init__(self, config: InternVitConfig, layers: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, layers)
        ends = config.ends_with_norm and layers == config.depth
        self.layernorm = LayerNorm(config.hidden_size, config.eps) if ends else None

    def steps(self, pixels: Tensor) -> Steps[Tensor]:
        yield pixels.numel() * self.config.hidden_size
        embedded = self.embeddings(pixels.to(self.embeddings.class_embedding.dtype))
        count, positions, hidden = embedded.shape
        x = embedded.view(count * positions, hidden)
        for layer in self.encoder.layers:
            x = yield from layer(x, [positions] * count)
        if self.layernorm is not None:
            x = self.layernorm(x)
        out: Tensor = x.view(count, positions, hidden)[:, 1:]
        return out

    @property
    def group_size(self) -> int:
        """Squares that are computed at once."""
        return max(1, group_rows(self.embeddings.class_embedding) // self.config.num_positions)

    def activation_bytes(self, element_size: int) -> int:
        config = self.config
        per_row = 10 * config.hidden_size + 3 * config.intermediate_size
        rows = self.group_size * config.num_positions
        return rows * element_size * (per_row + 6 * config.patch_size**2)
