"""InternVL 2.5, 3 and 3.5: InternViT, blocks of its patches through an MLP, and a Qwen2, Qwen3 or Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import inverse, square
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename
from sensorium.models.decoder import DECODER_MAP
from sensorium.models.squares import SquaresModel
from sensorium.models.towers.blocks import Projector, hidden_state
from sensorium.models.towers.intern_vit import INTERN_VIT_MAP, InternVit, InternVitConfig
from sensorium.types import Modality

NORM_EPS = 1e-5  # torch's own


class InternVL(SquaresModel):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "model.vision_tower.": "vision_model.",
        "vision_tower.": "vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *DECODER_MAP,
        *INTERN_VIT_MAP,
        Rename("mlp1.0.{p}", "multi_modal_projector.layer_norm.{p}"),
        Rename("mlp1.1.{p}", "multi_modal_projector.linear_1.{p}"),
        Rename("mlp1.3.{p}", "multi_modal_projector.linear_2.{p}"),
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.config
        _check(config)
        vision = config.get("vision_config") or {}
        patch = square(vision, "patch_size", 14)
        tower = InternVitConfig.of(vision, square(vision, "image_size", 448), patch)
        layers = hidden_state(config.get("select_layer", config.get("vision_feature_layer", -1)), tower.depth)
        self.vision_model = InternVit(tower, layers)
        self.side, self.merge = tower.side, inverse(config, "downsample_ratio", 0.5)
        block, hidden = tower.hidden_size * self.merge**2, self.text.hidden_size
        act = config.get("projector_hidden_act", "gelu")
        self.multi_modal_projector = Projector(block, hidden, hidden, act, eps=NORM_EPS)
        unused = [f"vision_model.encoder.layers.{index}." for index in range(layers, tower.depth)]
        self.ignored = (*self.ignored, *unused, ".embeddings.mask_token")


def _check(config: Mapping[str, object]) -> None:
    """CheckpointError on what only models before 2.5 have."""
    version, strategy = config.get("ps_version", "v2"), config.get("vision_feature_select_strategy", "default")
    if version != "v2":
        raise CheckpointError(f"config.json: ps_version {version!r} is not supported (v2 is)")
    if strategy != "default":
        raise CheckpointError(f"config.json: vision_feature_select_strategy {strategy!r} is not supported (default is)")
