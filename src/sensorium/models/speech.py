"""What language models behind an audio tower share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM
from sensorium.models.towers.whisper import AudioEncoder
from sensorium.types import Modality


class SpeechDecoder(DecoderForCausalLM):
    """A decoder and its `audio_tower`."""

    modalities: ClassVar[frozenset[Modality]] = frozenset({"audio"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "model.audio_tower.": "audio_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    weight_map: ClassVar[tuple[Rename, ...]] = DECODER_MAP
    audio_tower: AudioEncoder

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        return max(super().activation_bytes(tokens), self.audio_tower.activation_bytes(size))
