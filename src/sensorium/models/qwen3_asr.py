"""Qwen3-ASR: Qwen3-Omni's audio tower and a dense Qwen3 decoder, published in two dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename, Steps
from sensorium.models.speech import SpeechDecoder
from sensorium.models.towers.qwen3_audio import Qwen3AudioTower
from sensorium.types import Modality


class Qwen3Asr(SpeechDecoder):
    weight_prefixes: ClassVar[Mapping[str, str]] = {"thinker.": "", **SpeechDecoder.weight_prefixes}
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *SpeechDecoder.weight_map,
        Rename("multi_modal_projector.linear_1.{p}", "audio_tower.proj1.{p}"),
        Rename("multi_modal_projector.linear_2.{p}", "audio_tower.proj2.{p}"),
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        audio = checkpoint.config.get("audio_config") or {}
        # The two dialects' programs differ in clips shorter than a chunk; each is followed.
        fills_chunks = audio.get("model_type") == "qwen3_asr_encoder"
        self.audio_tower: Qwen3AudioTower = Qwen3AudioTower(audio, self.text.hidden_size, fills_chunks=fills_chunks)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`mel` [bins, frames] of each clip."""
        dtype = self.audio_tower.ln_post.weight.dtype
        return (yield from self.audio_tower.steps([item["mel"].to(dtype) for item in items]))
