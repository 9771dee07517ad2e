"""Qwen2-Audio: averaged pairs of Whisper's states, one linear layer, and Qwen2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Steps
from sensorium.models.layers import Linear
from sensorium.models.speech import SpeechDecoder
from sensorium.models.towers.whisper import PooledWhisperTower, WhisperConfig
from sensorium.types import Modality


class Projector(nn.Module):
    def __init__(self, audio_size: int, text_size: int) -> None:
        super().__init__()
        self.linear = Linear(audio_size, text_size, bias=True)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.linear(states)
        return out


class Qwen2Audio(SpeechDecoder):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        audio = WhisperConfig.of(checkpoint.config.get("audio_config") or {})
        self.audio_tower: PooledWhisperTower = PooledWhisperTower(audio)
        self.multi_modal_projector = Projector(audio.hidden_size, self.text.hidden_size)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`mel` [bins, window] of each clip, of which `frames` are its own."""
        dtype = self.audio_tower.layer_norm.weight.dtype
        clips = [item["mel"].to(dtype) for item in items]
        frames: list[int] = [count for item in items for count in item["frames"].tolist()]
        states = yield from self.audio_tower.steps(clips, frames)
        return [self.multi_modal_projector(x) for x in states]
