"""Thinkers, the parts of Qwen's omni models that write text: a Qwen-VL and an audio tower. Qwen2.5-Omni's.

The parts that speak (talker, token2wav, code2wav) are not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Steps
from sensorium.models.qwen2_5_vl import Qwen25VL
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.qwen3_audio import Qwen3AudioTower
from sensorium.models.towers.whisper import OmniAudioTower
from sensorium.types import Modality


class Thinker(Qwen2VL):
    """What adds hearing to a generation of Qwen-VL, before which it stands among the bases."""

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
    ignored: tuple[str, ...] = (
        *Qwen2VL.ignored,
        "talker.",
        "token2wav.",
        "code2wav.",
        "audio_bos_eos_token.weight",
        "positional_embedding.positional_embedding",
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.audio_tower = self.build_audio(checkpoint)

    def build_audio(self, checkpoint: Checkpoint) -> OmniAudioTower | Qwen3AudioTower:
        raise NotImplementedError

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`mel` [bins, frames] of each clip; images and videos as the generation has them."""
        if kind == "audio":
            dtype = self.audio_tower.ln_post.weight.dtype
            return (yield from self.audio_tower.steps([item["mel"].to(dtype) for item in items]))
        return (yield from super().encoding(kind, items))

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.audio_tower.activation_bytes(size))


class Qwen2Omni(Thinker, Qwen25VL):
    tower_width: ClassVar[int] = 1280

    def build_audio(self, checkpoint: Checkpoint) -> OmniAudioTower:
        audio = checkpoint.config.get("audio_config") or {}
        return OmniAudioTower({"output_dim": self.text.hidden_size, **audio})
