"""Qwen3-Omni's thinker: Qwen3-VL's mixture of experts with its tower, and the audio tower that Qwen3-ASR has too."""

from __future__ import annotations

from typing import ClassVar

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename
from sensorium.models.qwen2_omni import Thinker
from sensorium.models.qwen3_vl import Qwen3VL
from sensorium.models.towers.qwen3_audio import Qwen3AudioTower


class Qwen3Omni(Thinker, Qwen3VL):
    """Experts are stored one by one."""

    weight_map: ClassVar[tuple[Rename, ...]] = (
        *Qwen3VL.weight_map,
        Rename("visual.merger_list.{n}.{p}.{q}", "visual.deepstack_merger_list.{n}.{p}.{q}"),
        Rename("visual.merger_list.{n}.mlp.{m}.{p}", "visual.deepstack_merger_list.{n}.mlp.{m}.{p}"),
    )

    def build_audio(self, checkpoint: Checkpoint) -> Qwen3AudioTower:
        return Qwen3AudioTower(checkpoint.config.get("audio_config") or {}, self.text.hidden_size)
