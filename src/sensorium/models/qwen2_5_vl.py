"""Qwen2.5-VL: Qwen2-VL's decoder behind a tower most of whose layers look through windows."""

from __future__ import annotations

from typing import ClassVar

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.qwen_vit import WINDOWED_VIT_MAP, QwenVit, QwenVitConfig, WindowedQwenVit


class Qwen25VL(Qwen2VL):
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *WINDOWED_VIT_MAP)
    tower_width: ClassVar[int] = 3584  # where `vision_config` has no `hidden_size`

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        config = QwenVitConfig.windowed(checkpoint.config.get("vision_config") or {}, self.tower_width)
        return WindowedQwenVit(config, self.text.hidden_size)
