"""Ultravox v0.5: Whisper's encoder, a projector over stacked frames, and a language model from a second repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.base import Steps
from sensorium.models.layers import Linear, RMSNorm
from sensorium.models.speech import SpeechDecoder
from sensorium.models.towers.whisper import WhisperConfig, WhisperTower
from sensorium.types import Modality

PROJECTOR_EPS = 1e-6


class Projector(nn.Module):
    """Stacked frames -> the language model's size. The second half of the first product is the gate."""

    def __init__(self, audio_size: int, text_size: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        if config.get("projector_act", "swiglu") != "swiglu":
            raise CheckpointError(f"config.json: projector_act {config['projector_act']!r} is not supported")
        if config.get("num_projector_layers", 0):
            raise CheckpointError("config.json: Ultravox with projector layers (v0.6 and later) is not supported")
        self.stack = int(config.get("stack_factor", 8))
        inner = int(config.get("hidden_size", 4096))
        self.ln_pre = RMSNorm(audio_size * self.stack, PROJECTOR_EPS)
        self.linear_1 = Linear(audio_size * self.stack, inner)
        self.linear_2 = Linear(inner // 2, text_size)
        self.ln_mid = RMSNorm(inner // 2, PROJECTOR_EPS) if config.get("projector_ln_mid", False) else None
        self.ln_post = None if self.ln_mid is not None else RMSNorm(text_size, PROJECTOR_EPS)

    def forward(self, states: Tensor) -> Tensor:
        """[frames, audio size] -> [ceil(frames / stack), text size]"""
        missing = -len(states) % self.stack
        x = functional.pad(states, (0, 0, 0, missing)).reshape(-1, states.shape[1] * self.stack)
        value, gate = self.linear_1(self.ln_pre(x)).chunk(2, dim=-1)
        x = functional.silu(gate) * value
        out: Tensor = self.linear_2(x if self.ln_mid is None else self.ln_mid(x))
        return out if self.ln_post is None else self.ln_post.forward(out)


class Ultravox(SpeechDecoder):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        audio = WhisperConfig.of(checkpoint.config.get("audio_config") or {})
        self.audio_tower: WhisperTower = WhisperTower(audio)
        self.multi_modal_projector = Projector(audio.hidden_size, self.text.hidden_size, checkpoint.config)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`mel` [bins, frames] of each clip; chunks of all clips go through the tower in one batch."""
        chunk_frames = 2 * self.audio_tower.config.max_positions
        dtype = self.audio_tower.layer_norm.weight.dtype
        chunks = [torch.split(item["mel"].to(dtype), chunk_frames, dim=1) for item in items]
        frames = [chunk.shape[1] for clip in chunks for chunk in clip]
        padded = [
            self._padded(chunk, chunk_frames) if index else chunk for clip in chunks for index, chunk in enumerate(clip)
        ]
        states = iter((yield from self.audio_tower.steps(padded, frames)))
        return [torch.cat([self.multi_modal_projector(next(states)) for _ in clip]) for clip in chunks]

    def _padded(self, chunk: Tensor, chunk_frames: int) -> Tensor:
        """A later chunk [bins, frames] as far as its rows reach: the published code pads these to full length, and the
        states behind the end, though nothing attends to them, are stacked into the last row with those before it."""
        per_row = 2 * self.multi_modal_projector.stack
        wanted = min(-(-chunk.shape[1] // per_row) * per_row, chunk_frames)
        return functional.pad(chunk, (0, wanted - chunk.shape[1]))
