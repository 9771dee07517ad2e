"""SmolVLM, SmolVLM2 and Idefics3: SigLIP on tiles of its size, blocks of their patches through one product, and a Llama
decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int, square
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP
from sensorium.models.layers import Linear
from sensorium.models.squares import SquaresModel
from sensorium.models.towers.clip import ClipConfig, ClipTower, clip_map
from sensorium.types import Modality

VISION: Mapping[str, Any] = {  # transformers' defaults, which are of no published checkpoint
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


class SmolVLM(SquaresModel):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "model.text_model.": "model.",
        "model.vision_model.": "vision_model.",
        "model.connector.": "connector.",
    }
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *DECODER_MAP,
        *clip_map("vision_model"),
        Rename("connector.modality_projection.proj.{p}", "multi_modal_projector.{p}"),
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.config
        vision = config.get("vision_config") or {}
        given = {name: value for name in VISION if (value := vision.get(name)) is not None}
        sizes = {"image_size": square(vision, "image_size", 224), "patch_size": square(vision, "patch_size", 32)}
        tower = ClipConfig.of({"model_type": "siglip_vision_model", **VISION, **given, **sizes})
        self.side, self.merge = tower.image_size // tower.patch_size, positive_int(config, "scale_factor", 2)
        if self.side % self.merge:
            raise CheckpointError(f"config.json: scale_factor {self.merge} does not divide {self.side} patches")
        self.vision_model = ClipTower(tower, [-1], keeps_class_token=True, ends_with_norm=True)
        self.multi_modal_projector = Linear(tower.hidden_size * self.merge**2, self.text.hidden_size)
        self.ignored = (*self.ignored, "position_ids")


class Idefics3(SmolVLM):
    modalities = frozenset({"image"})
