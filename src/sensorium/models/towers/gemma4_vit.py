"""Gemma 4's vision tower: patches of images of any size, positions by two tables and by rotation of either half of a
head, averages of the patches of each field. Activations are flat: [patches of all images, hidden]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.values import epsilon, number, positive_int
from sensorium.errors import CheckpointError
from sensorium.models.base import Steps
from sensorium.models.layers import Linear, PlainNorm, RMSNorm, activation_name, declare
from sensorium.models.towers.blocks import CPU_GROUP_ROWS, MAX_ROWS, ClippedLinear, attention, by_rows, weights

Rotation = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(cos, sin) of columns and of lines, float32 [patches, head_dim / 4]."""


class VisionLayer(nn.Module):
    def __init__(self, vision: Mapping[str, Any], size: int, eps: float) -> None:
        super().__init__()
        given = dict(vision)
        self.head_dim = positive_int(given, "head_dim", 64)
        heads = positive_int(given, "num_attention_heads", 12)
        kv_heads = positive_int(given, "num_key_value_heads", 12)
        inner = positive_int(given, "intermediate_size", 3072)
        has_bounds = bool(vision.get("use_clipped_linears", False))

        def linear(inputs: int, outputs: int) -> ClippedLinear:
            return ClippedLinear(inputs, outputs, has_bounds=has_bounds)

        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(size, heads * self.head_dim),
                "k_proj": linear(size, kv_heads * self.head_dim),
                "v_proj": linear(size, kv_heads * self.head_dim),
                "o_proj": linear(heads * self.head_dim, size),
                "q_norm": RMSNorm(self.head_dim, eps),
                "k_norm": RMSNorm(self.head_dim, eps),
                "v_norm": PlainNorm(self.head_dim, eps),
            }
        )
        self.mlp = nn.ModuleDict(
            {"gate_proj": linear(size, inner), "up_proj": linear(size, inner), "down_proj": linear(inner, size)}
        )
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.activation = activation_name(str(vision.get("hidden_activation") or "gelu_pytorch_tanh"))

    def forward(self, x: Tensor, rotation: Rotation, lengths: Sequence[int]) -> Steps[Tensor]:
        own = self.self_attn
        normed = self.input_layernorm(x)
        yield len(x) * weights(own)
        q, k, v = (
            own[f"{name}_norm"](own[f"{name}_proj"](normed).view(len(x), -1, self.head_dim)) for name in ("q", "k", "v")
        )
        attended = yield from attention(_rotated(q, rotation), _rotated(k, rotation), v, lengths, 1.0)
        return (yield from by_rows(self._rest, weights(self.mlp), x, attended.flatten(1)))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn["o_proj"](attended))
        normed, mlp = self.pre_feedforward_layernorm(x), self.mlp
        gated = kernels.activate(mlp["gate_proj"](normed), self.activation) * mlp["up_proj"](normed)
        out: Tensor = x + self.post_feedforward_layernorm(mlp["down_proj"](gated))
        return out


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """The first half of every head by its patch's column, the second by its line."""
    halves = x.chunk(2, dim=-1)
    return torch.cat(
        [kernels.rope(half, half[:, :0], *turn)[0] for half, turn in zip(halves, rotation, strict=True)], -1
    )


class PatchEmbedder(nn.Module):
    def __init__(self, patch_values: int, size: int, positions: int) -> None:
        super().__init__()
        self.input_proj = Linear(patch_values, size)
        self.position_embedding_table = declare(2, positions, size)

    def forward(self, pixels: Tensor, columns: Tensor, lines: Tensor) -> Tensor:
        table = self.position_embedding_table
        rows: Tensor = self.input_proj((2 * (pixels - 0.5)).to(table.dtype))
        return rows + (table[0, columns] + table[1, lines])


class Gemma4VisionTower(nn.Module):
    """Patches of images -> [fields of all images, hidden]; a field is `kernel` x `kernel` patches."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.size = positive_int(vision, "hidden_size", 768)
        self.eps = epsilon(vision, "rms_norm_eps", 1e-6)
        self.kernel = positive_int(vision, "pooling_kernel_size", 3)
        self.inner = positive_int(vision, "intermediate_size", 3072)
        patch = positive_int(vision, "patch_size", 16)
        positions = positive_int(vision, "position_embedding_size", 10240)
        self.patch_embedder = PatchEmbedder(3 * patch**2, self.size, positions)
        layers = [
            VisionLayer(vision, self.size, self.eps) for _ in range(positive_int(vision, "num_hidden_layers", 16))
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.is_standardized = bool(vision.get("standardize", False))
        if self.is_standardized:
            self.std_bias, self.std_scale = declare(self.size), declare(self.size)
        rope = vision.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") not in ("axial", "default") or vision.get("attention_bias"):
            raise CheckpointError("config.json: vision_config's rope_type or attention_bias is not supported")
        half = layers[0].head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half
        self.register_buffer("inv_freq", number(rope, "rope_theta", 100.0) ** -exponents, persistent=False)

    inv_freq: Tensor  # float32 [head_dim / 4]

    @property
    def group_rows(self) -> int:
        """Patches that are computed together."""
        return CPU_GROUP_ROWS if self.patch_embedder.position_embedding_table.is_cpu else MAX_ROWS

    def activation_bytes(self, element_size: int) -> int:
        return MAX_ROWS * element_size * (9 * self.size + 3 * self.inner)

    def steps(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, ...]]) -> Steps[Tensor]:
        """`grids`: lines and columns of each image's patches, which stand line by line."""
        device = self.inv_freq.device
        places = [torch.arange(lines * columns, device=device) for lines, columns in grids]
        across = torch.cat([place % grid[1] for place, grid in zip(places, grids, strict=True)])
        down = torch.cat([place // grid[1] for place, grid in zip(places, grids, strict=True)])
        flat = torch.cat(list(pixels))
        yield flat.numel() * self.size
        x = self.patch_embedder(flat, across, down)
        angles = [axis.float().unsqueeze(1) * self.inv_freq for axis in (across, down)]
        rotation: Rotation = ((angles[0].cos(), angles[0].sin()), (angles[1].cos(), angles[1].sin()))
        lengths = [lines * columns for lines, columns in grids]
        layers = self.encoder["layers"]
        if not isinstance(layers, nn.ModuleList):
            raise TypeError("layers are a list")
        for layer in layers:
            x = yield from layer(x, rotation, lengths)
        return self._averaged(x, grids, lengths)

    def _averaged(self, x: Tensor, grids: Sequence[tuple[int, ...]], lengths: list[int]) -> Tensor:
        kernel, parts = self.kernel, []
        for rows, (lines, columns) in zip(torch.split(x.float(), lengths), grids, strict=True):
            fields = rows.view(lines // kernel, kernel, columns // kernel, kernel, self.size)
            parts.append(fields.mean(dim=(1, 3)).flatten(0, 1).to(x.dtype))
        means = torch.cat(parts).float() * self.size**0.5
        if self.is_standardized:
            means = (means - self.std_bias.float()) * self.std_scale.float()
        out: Tensor = means.to(x.dtype)
        return out
