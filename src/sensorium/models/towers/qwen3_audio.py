"""The audio tower of Qwen3-ASR and Qwen3-Omni: a clip is cut into chunks of a second before three strided convolutions,
positions begin anew in each, and layers look through windows of eight chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError
from sensorium.models.base import Steps, finished
from sensorium.models.layers import Linear
from sensorium.models.towers.blocks import PIECE_MACS, Conv2d, LayerNorm, activation, by_rows, weights
from sensorium.models.towers.whisper import LAYER_NORM_EPS, AudioEncoder, WhisperConfig, sinusoids

CONVOLUTIONS = 3
MAX_CHUNKS = 64  # that go through the convolutions at once


def rows_of_chunk(frames: int) -> int:
    """What the convolutions leave of so many mel frames, or of so many bins."""
    for _ in range(CONVOLUTIONS):
        frames = (frames - 1) // 2 + 1
    return frames


class Qwen3AudioTower(AudioEncoder):
    key_bias: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any], out_features: int, *, fills_chunks: bool = False) -> None:
        """`fills_chunks`: a clip that is shorter than a chunk is convolved with the silence behind it, as the last
        chunk of longer ones is in any case."""
        super().__init__(WhisperConfig.of(config))
        shape = self.config
        channels = positive_int(config, "downsample_hidden_size", 480)
        self.fills_chunks = fills_chunks
        self.chunk = 2 * positive_int(config, "n_window", 50)
        window = positive_int(config, "n_window_infer", 800)
        if window % self.chunk:
            raise CheckpointError(f"config.json: n_window_infer {window} must be a multiple of 2 x n_window")
        self.window_rows = window // self.chunk * rows_of_chunk(self.chunk)
        self.conv2d1 = Conv2d(1, channels)
        self.conv2d2 = Conv2d(channels, channels)
        self.conv2d3 = Conv2d(channels, channels)
        self.conv_out = Linear(channels * rows_of_chunk(shape.num_mel_bins), shape.hidden_size)
        self.ln_post = LayerNorm(shape.hidden_size, LAYER_NORM_EPS)
        self.proj1 = Linear(shape.hidden_size, shape.hidden_size, bias=True)
        self.act = activation(shape.activation)
        self.proj2 = Linear(shape.hidden_size, out_features, bias=True)

    def forward(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """[bins, frames] each -> rows [n, output] of each, `rows_of_chunk` of every chunk."""
        return finished(self.steps(clips))

    def steps(self, clips: Sequence[Tensor]) -> Steps[list[Tensor]]:
        windows: list[list[Tensor]] = []
        for clip in clips:
            states = yield from self._convolve(clip)
            windows.append(list(torch.split(states, self.window_rows)))
        attended = iter((yield from self.attend([part for parts in windows for part in parts])))
        out = []
        for parts in windows:
            whole = torch.cat([next(attended) for _ in parts])
            out.append((yield from by_rows(self._finish, weights(self.proj1, self.proj2), whole)))
        return out

    def _convolve(self, clip: Tensor) -> Steps[Tensor]:
        """[bins, frames] -> states [n, hidden] with the positions in their chunks."""
        frames = clip.shape[1]
        length = min(self.chunk, frames) if not self.fills_chunks else self.chunk
        chunks = functional.pad(clip, (0, -frames % length)).view(len(clip), -1, length).transpose(0, 1)
        places = sinusoids(rows_of_chunk(length), self.config.hidden_size).to(clip)
        macs = self._chunk_macs(length)
        most = max(1, min(MAX_CHUNKS, PIECE_MACS // macs))
        rows = []
        for group in torch.split(chunks, most):
            yield len(group) * macs
            x = group.unsqueeze(1)
            for convolve in (self.conv2d1, self.conv2d2, self.conv2d3):
                x = functional.gelu(convolve(x))
            x = self.conv_out(x.permute(0, 3, 1, 2).flatten(2))  # of every time all channels' bins
            rows.append((x + places).flatten(0, 1))
        kept = frames // length * rows_of_chunk(length)
        if rest := frames % length:
            kept += rows_of_chunk(rest)
        return torch.cat(rows)[:kept]

    def _chunk_macs(self, frames: int) -> int:
        """Multiply-adds of a chunk's convolutions, nearly all of them the second's and third's."""
        channels, places = len(self.conv2d1.weight), self.config.num_mel_bins * frames
        return 9 * channels * (places // 4 + channels * (places // 16 + places // 64))

    def _finish(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj2(self.act(self.proj1(self.ln_post(x))))
        return out

    def activation_bytes(self, element_size: int) -> int:
        """Of one group of windows in one layer, or of one group of chunks behind the first convolution."""
        plane = len(self.conv2d1.weight) * self.config.num_mel_bins * self.chunk // 4
        most = max(1, min(MAX_CHUNKS, PIECE_MACS // self._chunk_macs(self.chunk)))
        return max(super().activation_bytes(element_size), 3 * most * plane * max(element_size, 4))
