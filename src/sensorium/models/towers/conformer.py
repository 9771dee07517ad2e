"""An audio tower of conformer layers (Gulati et al. 2020) as Google's universal speech model has them (Zhang et al.
2023): two strided convolutions over mel frames, then MLPs of half weight about attention to the last few rows and a
causal convolution over time. Gemma 4's; no row sees what is said after it.

Source: transformers' Gemma4AudioModel. Rows of several clips lie one behind the other: [rows of all clips, hidden].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium import kernels
from sensorium.checkpoint.values import count, number, positive_int
from sensorium.errors import CheckpointError
from sensorium.models.base import Steps
from sensorium.models.layers import Linear, RMSNorm, activation_name, declare
from sensorium.models.towers.blocks import (
    MAX_ROWS,
    ClippedLinear,
    Conv2d,
    LayerNorm,
    by_rows,
    group_rows,
    groups,
    weights,
)

NORM_EPS = 1e-6  # of the norms that no configuration tells of
WIDENING = 4  # of the MLPs
LONGEST_PERIOD = 10_000.0  # of the sines of distances


@dataclass(frozen=True, slots=True)
class ConformerConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    channels: tuple[int, int]  # of the strided convolutions
    kernel: int  # rows of the causal convolution
    chunk: int  # queries that are computed together
    window: int  # rows that a row attends to, its own included
    cap: float  # of attention scores: cap * tanh(scores / cap)
    mlp_weight: float
    bound: float  # states are held within it
    eps: float
    output_size: int
    activation: kernels.Activation
    has_bounds: bool  # of linear layers

    @classmethod
    def of(cls, audio: Mapping[str, Any]) -> ConformerConfig:
        """CheckpointError names what is not supported."""
        channels = audio.get("subsampling_conv_channels") or (128, 32)
        if len(channels) != 2 or not all(isinstance(one, int) and one > 0 for one in channels) or channels[0] % 4:
            raise CheckpointError(f"config.json: subsampling_conv_channels {channels} are not two, the first of fours")
        chunk = positive_int(audio, "attention_chunk_size", 12)
        window = positive_int(audio, "attention_context_left", 13) - 1
        if count(audio, "attention_context_right", 0) or not window or (chunk + window) // 2 != window:
            raise CheckpointError(
                "config.json: audio_config's attention_context_right must be 0, and attention_context_left one more "
                "than attention_chunk_size"
            )
        return cls(
            hidden_size=positive_int(audio, "hidden_size", 1024),
            num_layers=positive_int(audio, "num_hidden_layers", 12),
            num_heads=positive_int(audio, "num_attention_heads", 8),
            channels=(channels[0], channels[1]),
            kernel=positive_int(audio, "conv_kernel_size", 5),
            chunk=chunk,
            window=window,
            cap=number(audio, "attention_logit_cap", 50.0),
            mlp_weight=number(audio, "residual_weight", 0.5),
            bound=number(audio, "gradient_clipping", 1e10),
            eps=number(audio, "rms_norm_eps", 1e-6),
            output_size=positive_int(audio, "output_proj_dims", 1536),
            activation=activation_name(str(audio.get("hidden_act") or "silu")),
            has_bounds=bool(audio.get("use_clipped_linears", True)),
        )

    def linear(self, inputs: int, outputs: int) -> ClippedLinear:
        return ClippedLinear(inputs, outputs, has_bounds=self.has_bounds)

    def norm(self) -> RMSNorm:
        return RMSNorm(self.hidden_size, NORM_EPS)

    def held(self, x: Tensor) -> Tensor:
        bound = min(self.bound, torch.finfo(x.dtype).max)
        return x.clamp(-bound, bound)


class Subsampling(nn.Module):
    def __init__(self, config: ConformerConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, bias=False)
        self.norm = LayerNorm(out_channels, config.eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[frames, bins, channels] -> half of both, rounded up."""
        planes = self.conv(x.permute(2, 0, 1).unsqueeze(0))[0]
        normed: Tensor = self.norm(planes.permute(1, 2, 0).contiguous())
        return functional.relu(normed)


class Front(nn.Module):
    """A clip's mel frames [frames, bins] -> rows [ceil(frames / 4), hidden], of `channels[0]` / 4 strided bins."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        first, second = config.channels
        self.layer0 = Subsampling(config, 1, first)
        self.layer1 = Subsampling(config, first, second)
        self.input_proj_linear = Linear(first // 4 * second, config.hidden_size)

    def forward(self, mel: Tensor) -> Tensor:
        rows: Tensor = self.input_proj_linear(self.layer1(self.layer0(mel.unsqueeze(2))).flatten(1))
        return rows

    def macs(self, mel: Tensor) -> int:
        first, second = (len(layer.conv.weight) for layer in (self.layer0, self.layer1))
        return 9 * mel.numel() * first // 4 * (1 + second // 4) + mel.shape[0] // 4 * weights(self)


class FeedForward(nn.Module):
    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.ffw_layer_1 = config.linear(size, WIDENING * size)
        self.ffw_layer_2 = config.linear(WIDENING * size, size)
        self.pre_layer_norm, self.post_layer_norm = config.norm(), config.norm()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.ffw_layer_1(self.pre_layer_norm(self.config.held(x)))
        out = self.ffw_layer_2(kernels.activate(inner, self.config.activation))
        summed: Tensor = x + self.post_layer_norm(self.config.held(out)) * self.config.mlp_weight
        return summed


class LocalAttention(nn.Module):
    """Every row sees the `window` rows up to its own in its clip, and how far they are."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.head_dim = size // config.num_heads
        self.q_proj, self.k_proj, self.v_proj = (config.linear(size, size) for _ in range(3))
        self.post = config.linear(size, size)
        self.relative_k_proj = Linear(size, size)
        self.per_dim_scale = declare(self.head_dim)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values [rows, 3 * hidden]."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=1)

    def attend(self, projected: Tensor, lengths: Sequence[int]) -> Steps[Tensor]:
        """[rows, 3 * hidden] -> [rows, hidden], in float32 between."""
        config, before = self.config, self.config.window - 1
        q, k, v = projected.float().view(len(projected), 3, config.num_heads, self.head_dim).unbind(1)
        q = q * (functional.softplus(self.per_dim_scale.float()) / (self.head_dim**0.5 * math.log(2)))
        k = k * (math.log(1 + math.e) / math.log(2))
        near = self._near()
        parts = []
        for queries, keys, values in zip(*(torch.split(x, list(lengths)) for x in (q, k, v)), strict=True):
            yield 3 * keys.numel() * (config.chunk + before)
            padded = functional.pad(queries, (0, 0, 0, 0, 0, -len(queries) % config.chunk))
            blocks = padded.view(-1, config.chunk, *padded.shape[1:]).transpose(
                1, 2
            )  # [blocks, heads, chunk, head_dim]
            found = self._scored(blocks, self._context(keys).transpose(2, 3), near) @ self._context(values)
            parts.append(found.transpose(1, 2).flatten(0, 1)[: len(queries)])
        return torch.cat(parts).flatten(1).to(projected.dtype)

    def _near(self) -> Tensor:
        """Of each distance what queries are multiplied with: float32 [heads, head_dim, window]."""
        weight = self.relative_k_proj.packed
        half, device = self.config.hidden_size // 2, self.per_dim_scale.device
        step = math.log(LONGEST_PERIOD) / max(half - 1, 1)
        angles = torch.arange(self.config.window, device=device).unsqueeze(1) * torch.exp(
            torch.arange(half, device=device) * -step
        )
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.per_dim_scale.dtype)
        return weight(waves).view(len(waves), -1, self.head_dim).permute(1, 2, 0).float()

    def _context(self, x: Tensor) -> Tensor:
        """[rows, heads, head_dim] -> what each chunk of queries may see [chunks, heads, chunk + window - 1, head_dim],
        zeros before the first row."""
        chunk, before = self.config.chunk, self.config.window - 1
        padded = functional.pad(x, (0, 0, 0, 0, before, -len(x) % chunk))
        return padded.unfold(0, chunk + before, chunk).transpose(2, 3)

    def _scored(self, queries: Tensor, keys: Tensor, near: Tensor) -> Tensor:
        """Softmax of scores [chunks, heads, chunk, chunk + window - 1]."""
        chunk, before, cap = self.config.chunk, self.config.window - 1, self.config.cap
        place = torch.arange(chunk, device=queries.device).unsqueeze(1)
        key = torch.arange(chunk + before, device=queries.device)
        distance = place + before - key
        by_distance = (queries @ near).gather(3, distance.clamp(0, before).expand(*queries.shape[:2], -1, -1))
        scores = ((queries @ keys + by_distance) / cap).tanh_() * cap
        starts = torch.arange(len(queries), device=queries.device) * chunk - before
        is_there = (starts.view(-1, 1, 1, 1) + key) >= 0
        return scores.masked_fill_(~((distance >= 0) & (distance <= before) & is_there), -torch.inf).softmax(-1)


class LightConvolution(nn.Module):
    """Causal, every channel on its own, behind a gate."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.linear_start = config.linear(size, 2 * size)
        self.linear_end = config.linear(size, size)
        self.depthwise_conv1d = nn.ParameterDict({"weight": declare(size, 1, config.kernel)})
        self.pre_layer_norm = RMSNorm(size, config.eps)
        self.conv_norm = RMSNorm(size, config.eps)

    def gate(self, x: Tensor) -> Tensor:
        return functional.glu(self.linear_start(self.pre_layer_norm(x)), dim=-1)

    def convolve(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """[rows, hidden] -> the same, each clip with zeros before it. In float32, as other towers' convolutions."""
        weight, out = self.depthwise_conv1d["weight"].float(), []
        for rows in torch.split(x.float(), list(lengths)):
            padded = functional.pad(rows.t(), (self.config.kernel - 1, 0))
            out.append(functional.conv1d(padded.unsqueeze(0), weight, groups=len(weight))[0].t())
        return torch.cat(out).to(x.dtype)

    def finish(self, x: Tensor, convolved: Tensor) -> Tensor:
        normed = kernels.activate(self.conv_norm(self.config.held(convolved)), self.config.activation)
        out: Tensor = x + self.linear_end(normed)
        return out


class ConformerLayer(nn.Module):
    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.feed_forward1, self.feed_forward2 = FeedForward(config), FeedForward(config)
        self.self_attn = LocalAttention(config)
        self.lconv1d = LightConvolution(config)
        self.norm_pre_attn, self.norm_post_attn, self.norm_out = config.norm(), config.norm(), config.norm()

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Steps[Tensor]:
        attention, convolution = self.self_attn, self.lconv1d
        x = yield from by_rows(self.feed_forward1, weights(self.feed_forward1), x)
        projected = yield from by_rows(self._project, 3 * x.shape[1] ** 2, x)
        attended = yield from attention.attend(projected, lengths)
        x = yield from by_rows(self._add, weights(attention.post), x, attended)
        gated = yield from by_rows(convolution.gate, weights(convolution.linear_start), x)
        yield self.config.kernel * gated.numel()
        convolved = convolution.convolve(gated, lengths)
        rest = weights(convolution.linear_end, self.feed_forward2)
        return (yield from by_rows(self._finish, rest, x, convolved))

    def _project(self, x: Tensor) -> Tensor:
        return self.self_attn.project(self.norm_pre_attn(self.config.held(x)))

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        out: Tensor = x + self.norm_post_attn(self.config.held(self.self_attn.post(attended)))
        return out

    def _finish(self, x: Tensor, convolved: Tensor) -> Tensor:
        x = self.feed_forward2(self.lconv1d.finish(x, convolved))
        out: Tensor = self.norm_out(self.config.held(x))
        return out


class Conformer(nn.Module):
    """Mel frames of clips -> rows [rows of all clips, output], one for every four frames that have begun."""

    def __init__(self, audio: Mapping[str, Any]) -> None:
        super().__init__()
        config = self.config = ConformerConfig.of(audio)
        self.subsample_conv_projection = Front(config)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_layers))
        self.output_proj = Linear(config.hidden_size, config.output_size, bias=True)

    def steps(self, clips: Sequence[Tensor]) -> Steps[list[Tensor]]:
        """[frames, bins] each -> [ceil(frames / 4), output] each."""
        embedded = []
        for clip in clips:
            yield self.subsample_conv_projection.macs(clip)
            embedded.append(self.subsample_conv_projection(clip))
        out: list[Tensor] = []
        lengths = [len(rows) for rows in embedded]
        for group in groups(lengths, group_rows(embedded[0])):
            x = torch.cat(embedded[group])
            for layer in self._layers():
                x = yield from layer(x, lengths[group])
            x = yield from by_rows(self.output_proj, weights(self.output_proj), x)
            out += torch.split(x, lengths[group])
        return out

    def _layers(self) -> Iterator[ConformerLayer]:
        return (layer for layer in self.layers if isinstance(layer, ConformerLayer))

    def activation_bytes(self, element_size: int) -> int:
        """Of one group of clips in one layer; scores and their parts are float32, of one clip."""
        config = self.config
        rows = MAX_ROWS * (element_size * (6 + WIDENING) + 4 * 4) * config.hidden_size
        return rows + MAX_ROWS * config.num_heads * 4 * 4 * (config.chunk + config.window)
