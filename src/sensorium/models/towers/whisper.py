"""Whisper's audio encoder (Radford et al. 2022) and its variant in Qwen2.5-Omni, on clips of any length.

Two convolutions over time (the second halves it), positions, pre-norm layers with attention inside each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium import kernels
from sensorium.models.base import Steps, finished
from sensorium.models.layers import Linear, declare
from sensorium.models.towers.blocks import (
    MAX_ROWS,
    LayerNorm,
    activation,
    attention,
    by_rows,
    group_rows,
    groups,
    weights,
)

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class WhisperConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_mel_bins: int
    max_positions: int  # encoder positions, half as many as mel frames
    activation: str

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> WhisperConfig:
        """Under Whisper's names, or those that transformers gives Voxtral's tower."""
        return cls(
            hidden_size=config.get("d_model", config.get("hidden_size", 1280)),
            num_layers=config.get("encoder_layers", config.get("num_hidden_layers", 32)),
            num_heads=config.get("encoder_attention_heads", config.get("num_attention_heads", 20)),
            intermediate_size=config.get("encoder_ffn_dim", config.get("intermediate_size", 5120)),
            num_mel_bins=config.get("num_mel_bins", 128),
            max_positions=config.get("max_source_positions", 1500),
            activation=config.get("activation_function", "gelu"),
        )


def frames_after_convolutions(frames: int) -> int:
    return (frames - 1) // 2 + 1


def sinusoids(length: int, channels: int) -> Tensor:
    """Sines, then cosines, of geometrically spaced time scales up to 10,000: [length, channels]."""
    step = math.log(10_000) / (channels // 2 - 1)
    scaled = torch.arange(length).unsqueeze(1) * torch.exp(-step * torch.arange(channels // 2).float())
    return torch.cat([scaled.sin(), scaled.cos()], dim=1)


class Conv1d(nn.Module):
    """Kernel 3, padding 1, on clips [clips, channels, frames]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.weight = declare(out_channels, in_channels, 3)
        self.bias = declare(out_channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return functional.conv1d(x, self.weight, self.bias, stride=self.stride, padding=1)
        # In float32: without instructions for bfloat16, torch's convolution of it is a hundred times slower.
        weight, bias = self.weight.float(), self.bias.float()
        return functional.conv1d(x.float(), weight, bias, stride=self.stride, padding=1).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, size: int, num_heads: int, key_bias: bool) -> None:
        super().__init__()
        self.head_dim = size // num_heads
        self.q_proj = Linear(size, size, bias=True)
        self.k_proj = Linear(size, size, bias=key_bias)
        self.v_proj = Linear(size, size, bias=True)
        self.out_proj = Linear(size, size, bias=True)

    def forward(self, norm: LayerNorm, x: Tensor, lengths: list[int], heard: list[int]) -> Steps[Tensor]:
        """Of the normed x, without the last product. Runs of `lengths` states, of which the first `heard` are seen by
        all of their run, and the others by none."""
        x = norm(x)
        heads = []
        for project in (self.q_proj, self.k_proj, self.v_proj):
            rows = yield from by_rows(project, weights(project), x)
            heads.append(rows.view(len(x), -1, self.head_dim))
        q, k, v = heads
        if heard == lengths:
            attended = yield from attention(q, k, v, lengths, self.head_dim**-0.5)
        else:
            yield sum(length**2 for length in lengths) * 2 * x.shape[1]
            attended = kernels.heard_attention(q, k, v, lengths, heard, self.head_dim**-0.5)
        return attended.reshape(len(x), -1)


class WhisperLayer(nn.Module):
    def __init__(self, config: WhisperConfig, key_bias: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_heads, key_bias)
        self.self_attn_layer_norm = LayerNorm(config.hidden_size, LAYER_NORM_EPS)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.act = activation(config.activation)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, LAYER_NORM_EPS)

    def forward(self, x: Tensor, lengths: list[int], heard: list[int]) -> Steps[Tensor]:
        attended = yield from self.self_attn(self.self_attn_layer_norm, x, lengths, heard)
        macs = weights(self.self_attn.out_proj, self.fc1, self.fc2)
        return (yield from by_rows(self._rest, macs, x, attended))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.out_proj(attended)
        out: Tensor = x + self.fc2(self.act(self.fc1(self.final_layer_norm(x))))
        return out


class AudioEncoder(nn.Module):
    """Layers over runs of states that do not see each other. Subclasses make the states and say what follows."""

    key_bias: ClassVar[bool] = False  # whether keys have a bias, as queries and values have

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(WhisperLayer(config, self.key_bias) for _ in range(config.num_layers))

    def attend(self, embedded: list[Tensor], heard: Sequence[int] | None = None) -> Steps[list[Tensor]]:
        """[n, hidden] each -> the same behind the layers. Of each run the first `heard` states are seen, None: all."""
        if not embedded:
            return []
        lengths = [len(x) for x in embedded]
        seen = lengths if heard is None else list(heard)
        out: list[Tensor] = []
        for group in groups(lengths, group_rows(embedded[0])):
            x, runs = torch.cat(embedded[group]), lengths[group]
            for layer in self.layers:
                x = yield from layer(x, runs, seen[group])
            out.extend(torch.split(x, runs))
        return out

    def activation_bytes(self, element_size: int) -> int:
        """Of one group of clips in one layer."""
        return MAX_ROWS * element_size * (6 * self.config.hidden_size + 2 * self.config.intermediate_size)


class WhisperEncoder(AudioEncoder):
    """Convolutions over time, positions and layers. Subclasses say where the positions come from."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.conv1 = Conv1d(config.num_mel_bins, config.hidden_size, stride=1)
        self.conv2 = Conv1d(config.hidden_size, config.hidden_size, stride=2)

    def positions(self, length: int, like: Tensor) -> Tensor:
        raise NotImplementedError

    def states(self, clips: Sequence[Tensor], frames: Sequence[int] | None = None) -> Steps[list[Tensor]]:
        """Log-mel clips [bins, frames] -> states [frames_after_convolutions, hidden] of each, before the last norm.

        Of a clip that is padded, `frames` says how many of its own are there: nothing attends to what comes behind.
        """
        embedded = yield from self._convolve(clips)
        heard = None if frames is None else [frames_after_convolutions(count) for count in frames]
        return (yield from self.attend(embedded, heard))

    def _convolve(self, clips: Sequence[Tensor]) -> Steps[list[Tensor]]:
        """[bins, frames] each -> [frames / 2, hidden] each. Clips of one length, as windows are, go together."""
        by_length: dict[int, list[int]] = {}
        for index, clip in enumerate(clips):
            by_length.setdefault(clip.shape[1], []).append(index)
        out = list(clips)
        for length, indices in by_length.items():
            most = max(1, 2 * group_rows(clips[0]) // length)
            for start in range(0, len(indices), most):
                group = indices[start : start + most]
                yield (
                    len(group)
                    * length
                    * 3
                    * self.config.hidden_size
                    * (self.config.num_mel_bins + self.config.hidden_size // 2)
                )
                x = functional.gelu(self.conv1(torch.stack([clips[i] for i in group])))
                x = functional.gelu(self.conv2(x)).transpose(1, 2)  # [clips, frames / 2, hidden]
                x = x + self.positions(x.shape[1], x)
                for i, states in zip(group, x, strict=True):
                    out[i] = states
        return out


class Positions(nn.Module):
    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.weight = declare(length, size)


class WhisperTower(WhisperEncoder):
    """As published by OpenAI and in Ultravox: stored positions, a norm at the end."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.embed_positions = Positions(config.max_positions, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size, LAYER_NORM_EPS)

    def positions(self, length: int, like: Tensor) -> Tensor:
        return self.embed_positions.weight[:length]

    def forward(self, clips: Sequence[Tensor], frames: Sequence[int] | None = None) -> list[Tensor]:
        """[bins, frames] each -> [frames_after_convolutions, hidden] each; `frames` as of `states`."""
        return finished(self.steps(clips, frames))

    def steps(self, clips: Sequence[Tensor], frames: Sequence[int] | None = None) -> Steps[list[Tensor]]:
        states = yield from self.states(clips, frames)
        return [self.layer_norm(x) for x in states]


def pair_means(x: Tensor) -> Tensor:
    """[n, size] -> [n // 2, size]; an odd state at the end is left out."""
    pairs = len(x) // 2
    return (x[0 : 2 * pairs : 2] + x[1 : 2 * pairs : 2]) / 2


class PooledWhisperTower(WhisperTower):
    """Qwen2-Audio's: nothing of a clip's padding is attended to, and pairs of states are averaged before the norm."""

    def steps(self, clips: Sequence[Tensor], frames: Sequence[int] | None = None) -> Steps[list[Tensor]]:
        """[bins, window] each -> [frames_after_convolutions(frames) // 2, hidden] each."""
        frames = frames or [clip.shape[1] for clip in clips]
        # The last state sees two frames of the padding.
        heard = [clip[:, : count + 2] for clip, count in zip(clips, frames, strict=True)]
        states = yield from self.states(heard, frames)
        kept = [x[: frames_after_convolutions(count)] for x, count in zip(states, frames, strict=True)]
        return [self.layer_norm(pair_means(x)) for x in kept]


class OmniAudioTower(WhisperEncoder):
    """Qwen2.5-Omni's: clips are cut into windows of `2 * n_window` mel frames which never see each other; then pairs of
    states are averaged, normed and projected to the language model's size."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(WhisperConfig.of(config))
        self.window = 2 * int(config.get("n_window", 100))
        self.ln_post = LayerNorm(self.config.hidden_size, LAYER_NORM_EPS)
        self.proj = Linear(self.config.hidden_size, config.get("output_dim", 3584), bias=True)

    def positions(self, length: int, like: Tensor) -> Tensor:
        return sinusoids(length, self.config.hidden_size).to(like)

    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """[bins, frames] each -> [(frames_after_convolutions - 2) // 2 + 1, output] each"""
        return finished(self.steps(clips))

    def steps(self, clips: Sequence[Tensor]) -> Steps[list[Tensor]]:
        windows = [torch.split(clip, self.window, dim=1) for clip in clips]
        states = iter((yield from self.states([window for clip in windows for window in clip])))
        joined = [torch.cat([next(states) for _ in clip]) for clip in windows]
        out = []
        for x in joined:
            yield len(x) * weights(self.proj) // 2
            out.append(self._finish(x))
        return out

    def _finish(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.ln_post(pair_means(x)))
        return out
