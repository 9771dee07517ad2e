"""Qwen2.5-Omni's thinker: a windowed vision tower, a Whisper-like audio tower, and Qwen2-VL's decoder.

The parts that speak (talker, token2wav) are not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.qwen_vit import WINDOWED_VIT_MAP, QwenVit, QwenVitConfig, WindowedQwenVit
from sensorium.models.towers.whisper import OmniAudioTower
from sensorium.types import Modality


class Qwen2Omni(Qwen2VL):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video", "audio"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "thinker.model.language_model.": "model.",
        "thinker.model.visual.": "visual.",
        "thinker.model.audio_tower.": "audio_tower.",
        "thinker.": "",
        "model.language_model.": "model.",
        "model.visual.": "visual.",
        "model.audio_tower.": "audio_tower.",
    }
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *WINDOWED_VIT_MAP)
    ignored: tuple[str, ...] = (
        *Qwen2VL.ignored,
        "talker.",
        "token2wav.",
        "audio_bos_eos_token.weight",
        "positional_embedding.positional_embedding",
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        audio = checkpoint.config.get("audio_config") or {}
        self.audio_tower = OmniAudioTower({"output_dim": self.text.hidden_size, **audio})

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        config = QwenVitConfig.windowed(checkpoint.config.get("vision_config") or {})
        return WindowedQwenVit(config, self.text.hidden_size)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        if kind == "audio":
            dtype = self.audio_tower.ln_post.weight.dtype
            return (yield from self.audio_tower.steps([item["mel"].to(dtype) for item in items]))
        return (yield from super().encoding(kind, items))

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.audio_tower.activation_bytes(size))
