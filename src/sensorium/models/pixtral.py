"""Mistral Small 3.1 and Pixtral 12B: Pixtral's tower and a Mistral decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP
from sensorium.models.llava import Llava
from sensorium.models.qwen2_vl import Qwen2VL
from sensorium.models.towers.pixtral import PIXTRAL_MAP, PixtralProjector, PixtralTower, pixtral_config
from sensorium.models.towers.qwen_vit import QwenVit
from sensorium.types import Modality


class Mistral3(Qwen2VL):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        prefix: target.replace("vision_tower.", "visual.") for prefix, target in Llava.weight_prefixes.items()
    } | {"vision_tower.": "visual."}
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *PIXTRAL_MAP)
    projector_bias: ClassVar[bool] = False  # where config.json does not say
    merges: ClassVar[bool] = True

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        config = checkpoint.config
        vision = config.get("vision_config") or {}
        merge = positive_int(config, "spatial_merge_size", 2) if self.merges else 1
        tower = pixtral_config(vision, merge, config.get("vision_feature_layer", -1))
        unused = range(tower.depth, positive_int(vision, "num_hidden_layers", 24))
        self.ignored = (*self.ignored, *(f"visual.blocks.{index}." for index in unused))
        projector = PixtralProjector(
            tower,
            self.text.hidden_size,
            config.get("projector_hidden_act", "gelu"),
            self.text.rms_norm_eps,
            bias=config.get("multimodal_projector_bias", self.projector_bias),
            merges=self.merges,
        )
        return PixtralTower(tower, self.text.hidden_size, projector)

    def _max_pixels(self) -> int | None:
        return None  # only sides are bounded: `max_model_len` tells how many patches there may be


class Pixtral(Mistral3):
    projector_bias = True
    merges = False

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        strategy = checkpoint.config.get("vision_feature_select_strategy", "full")
        if strategy != "full":
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy {strategy!r} leaves out a row of every image, but "
                "Pixtral's tower has no class token: it must be 'full'"
            )
        return super().build_vision(checkpoint)
