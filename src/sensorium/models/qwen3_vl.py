"""Qwen3-VL: a Qwen3 decoder, dense or with experts, whose positions have three axes and whose first layers take rows of
the tower too.

With a score in the place of the language head it ranks documents of text, images and videos.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename
from sensorium.models.classifiers import DecoderForSequenceClassification
from sensorium.models.decoder import DECODER_MAP, DecoderModel
from sensorium.models.experts import EXPERT_MAP
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.qwen3_vit import QWEN3_VIT_MAP, Qwen3Vit
from sensorium.models.towers.qwen_vit import QwenVit, QwenVitConfig


class Qwen3VL(Qwen2VL):
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *QWEN3_VIT_MAP)

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.deepstack = len(set(self.visual.config.tapped_layers))

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        return Qwen3Vit(QwenVitConfig.of_qwen3(checkpoint.config.get("vision_config") or {}), self.text.hidden_size)


class Qwen3VLMoe(Qwen3VL):
    """Experts of a layer are one tensor, on the hub with the inputs first, as transformers 5 writes it not."""

    weight_map: ClassVar[tuple[Rename, ...]] = (
        *(replace(row, inputs_first=None) for row in EXPERT_MAP if "[*]" in row.target),
        *Qwen3VL.weight_map,
    )


class Qwen3VLForSequenceClassification(DecoderForSequenceClassification, Qwen3VL):
    generates = False
    ignored: tuple[str, ...] = DecoderModel.ignored
