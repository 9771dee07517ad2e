"""Voxtral: Whisper's states of windows of 30 s, silence included, four to a row, and a Llama of Mistral's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Steps
from sensorium.models.speech import SpeechDecoder
from sensorium.models.towers.blocks import Projector, by_rows, weights
from sensorium.models.towers.whisper import WhisperConfig, WhisperTower
from sensorium.types import Modality


class Voxtral(SpeechDecoder):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        audio = WhisperConfig.of(checkpoint.config.get("audio_config") or {})
        self.audio_tower: WhisperTower = WhisperTower(audio)
        self.stacked_size = audio.intermediate_size
        act = checkpoint.config.get("projector_hidden_act", "gelu")
        text_size = self.text.hidden_size
        self.multi_modal_projector = Projector(self.stacked_size, text_size, text_size, act, bias=False)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`mel` [bins, frames] of each recording, a whole number of windows."""
        dtype, window = self.audio_tower.layer_norm.weight.dtype, 2 * self.audio_tower.config.max_positions
        windows = [torch.split(item["mel"].to(dtype), window, dim=1) for item in items]
        states = iter((yield from self.audio_tower.steps([one for clip in windows for one in clip])))
        macs, rows = weights(self.multi_modal_projector), []
        for clip in windows:
            stacked = torch.cat([next(states) for _ in clip]).reshape(-1, self.stacked_size)
            rows.append((yield from by_rows(self.multi_modal_projector, macs, stacked)))
        return rows
