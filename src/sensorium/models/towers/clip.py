"""CLIP's and SigLIP's vision towers, up to the layers whose hidden states are asked for. Squares of one size, any
number of them. SigLIP has no class token and no norm before the layers.

Activations are flat: [images * positions, hidden]. The layers after the last one asked for are not even built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.families import vision_tower
from sensorium.models.base import Rename, Steps, finished
from sensorium.models.layers import Linear, QKVLinear, declare
from sensorium.models.towers.blocks import (
    CPU_GROUP_ROWS,
    MAX_ROWS,
    LayerNorm,
    Mlp,
    PatchLinear,
    attention,
    by_rows,
    hidden_state,
    square_patches,
    weights,
)


def clip_map(prefix: str) -> tuple[Rename, ...]:
    """Rows of a weight map: separate q, k and v of every layer under `prefix` become one product."""
    attention = f"{prefix}.encoder.layers.{{n}}.self_attn"
    return tuple(Rename(f"{attention}.{part}_proj.{{p}}", f"{attention}.qkv_proj.{{p}}", part) for part in "qkv")


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """`vision_config` of a CLIP-like checkpoint; defaults are transformers' of CLIP, and of SigLIP in the registry."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    eps: float = 1e-5
    has_class_token: bool = True
    is_causal: bool = False  # of CLIP's text tower: tokens see those before them

    @classmethod
    def of(cls, vision: Mapping[str, Any]) -> ClipConfig:
        names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "eps": "layer_norm_eps"}
        given = {field: vision.get(names.get(field, field)) for field in cls.__dataclass_fields__}
        return cls(
            **{**asdict(vision_tower(vision)), **{field: value for field, value in given.items() if value is not None}}
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        return self.num_patches + self.has_class_token


class Positions(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.weight = declare(config.num_positions, config.hidden_size)


class ClipEmbeddings(nn.Module):
    """Pixels [n, 3, side, side] -> [n, positions, hidden]: the class token first, if there is one; positions added."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.class_embedding = declare(config.hidden_size) if config.has_class_token else None
        self.patch_embedding = PatchLinear(
            config.hidden_size, 3, config.patch_size, config.patch_size, bias=not config.has_class_token
        )
        self.position_embedding = Positions(config)

    def forward(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.patch_embedding(square_patches(pixels, self.patch))
        if self.class_embedding is not None:
            rows = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), rows], dim=1)
        rows += self.position_embedding.weight
        return rows


class ClipAttention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.qkv_proj = QKVLinear(config.hidden_size, config.num_heads, config.num_heads, self.head_dim, bias=True)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.is_causal = config.is_causal

    def forward(self, norm: LayerNorm, x: Tensor, lengths: list[int]) -> Steps[Tensor]:
        """Of the normed x, without the last product."""
        qkv = yield from by_rows(lambda rows: self.qkv_proj(norm(rows)), weights(self.qkv_proj), x)
        q, k, v = qkv.view(len(x), 3, self.num_heads, self.head_dim).unbind(1)
        if self.is_causal:
            return _looking_back(q, k, v, lengths, self.head_dim**-0.5).reshape(len(x), -1)
        attended = yield from attention(q, k, v, lengths, self.head_dim**-0.5)
        return attended.reshape(len(x), -1)


def _looking_back(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Attention of short texts, [tokens, heads, head_dim], run by run."""
    longest = max(lengths)
    ahead = torch.full((longest, longest), -torch.inf, device=q.device).triu_(1)
    runs = zip(*(torch.split(x, lengths) for x in (q, k, v)), lengths, strict=True)
    return torch.cat(
        [
            kernels.biased_attention(qs, ks, vs, ahead[:n, :n].expand(q.shape[1], -1, -1), scale)
            for qs, ks, vs, n in runs
        ]
    )


class ClipLayer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor, lengths: list[int]) -> Steps[Tensor]:
        attended = yield from self.self_attn(self.layer_norm1, x, lengths)
        return (yield from by_rows(self._rest, weights(self.self_attn.out_proj, self.mlp), x, attended))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.out_proj(attended)
        x += self.mlp(self.layer_norm2(x))
        return x


class ClipEncoder(nn.Module):
    def __init__(self, config: ClipConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(num_layers))


class ClipTower(nn.Module):
    """pixels [n, 3, side, side] -> [n, positions, hidden * states]; `states` as `blocks.hidden_state` reads them."""

    def __init__(
        self, config: ClipConfig, states: Sequence[int], *, keeps_class_token: bool, ends_with_norm: bool = False
    ) -> None:
        """Without `keeps_class_token` the first row is left out, whatever it is. `ends_with_norm`: what is given went
        through the tower's last norm."""
        super().__init__()
        self.config = config
        self.states = [hidden_state(state, config.num_layers) for state in states]
        self.first = 0 if keeps_class_token else 1
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = (
            LayerNorm(config.hidden_size, config.eps) if config.has_class_token else None
        )  # the checkpoints' spelling
        self.encoder = ClipEncoder(config, max(self.states))
        self.post_layernorm = LayerNorm(config.hidden_size, config.eps) if ends_with_norm else None

    @property
    def unused(self) -> tuple[str, ...]:
        """Names, relative to the tower, that a checkpoint may have and this tower does not need."""
        layers = range(len(self.encoder.layers), self.config.num_layers)
        norm = () if self.post_layernorm is not None else ("post_layernorm.",)
        return (*norm, "head.", *(f"encoder.layers.{index}." for index in layers))

    @property
    def group_size(self) -> int:
        """Images that are computed at once."""
        most = CPU_GROUP_ROWS if self.embeddings.position_embedding.weight.is_cpu else MAX_ROWS
        return max(1, most // self.config.num_positions)

    @property
    def num_rows(self) -> int:
        """Of one image."""
        return self.config.num_positions - self.first

    def activation_bytes(self, element_size: int) -> int:
        config = self.config
        rows = self.group_size * config.num_positions
        kept = len(self.states) * config.hidden_size
        per_row = 9 * config.hidden_size + 3 * config.intermediate_size + kept
        return rows * element_size * (per_row + 2 * 3 * config.patch_size**2)

    def forward(self, pixels: Tensor) -> Tensor:
        return finished(self.steps(pixels))

    def steps(self, pixels: Tensor) -> Steps[Tensor]:
        yield pixels.numel() * self.config.hidden_size
        embedded = self.embeddings(pixels.to(self.embeddings.position_embedding.weight.dtype))
        count, positions, hidden = embedded.shape
        if self.pre_layrnorm is not None:
            embedded = self.pre_layrnorm(embedded)
        x = embedded.view(count * positions, hidden)
        kept = {0: x}
        for index, layer in enumerate(self.encoder.layers, start=1):
            x = yield from layer(x, [positions] * count)
            if index in self.states:
                kept[index] = x
        rows = x if len(self.states) == 1 else torch.cat([kept[state] for state in self.states], dim=-1)
        if self.post_layernorm is not None:
            rows = self.post_layernorm(rows)
        return rows.view(count, positions, -1)[:, self.first :]
