"""ColPali: PaliGemma's tower and decoder with a small vector of every token in place of a language head.

A prompt's tokens see all of it, which is how PaliGemma reads what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from sensorium.checkpoint.text_config import TextConfig
from sensorium.models.colqwen import ColQwen2
from sensorium.models.layers import Linear
from sensorium.models.llava import Llava
from sensorium.models.towers.clip import ClipConfig, ClipTower


class LinearProjector(nn.Module):
    """States of patches [..., vision] -> rows [..., hidden]."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = Linear(vision_size, hidden_size, bias=True)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.linear(states)
        return out


class ColPali(Llava):
    generates = False
    weight_prefixes: ClassVar[Mapping[str, str]] = {  # transformers', and colpali-engine's, which has two `model.`
        "embedding_proj_layer.": "custom_text_proj.",
        "vlm.model.language_model.": "model.",
        "vlm.language_model.model.": "model.",
        "vlm.language_model.": "model.",
        "model.language_model.model.": "model.",
        "model.model.language_model.": "model.",
        **{
            f"{prefix}{part}.{inner}": f"{part}."
            for prefix in ("vlm.model.", "vlm.", "model.model.")
            for part, inner in (("vision_tower", "vision_model."), ("vision_tower", ""), ("multi_modal_projector", ""))
        },
        **Llava.weight_prefixes,
    }
    ignored: tuple[str, ...] = (*Llava.ignored, "lm_head.", "vlm.lm_head.", "vlm.language_model.lm_head.")

    def _declare_head(self, config: TextConfig) -> Linear | None:
        return None

    _make_poolers = ColQwen2._make_poolers

    def _declare_media(self, config: Mapping[str, Any]) -> None:
        vision = ClipConfig.of({"model_type": "siglip_vision_model", **(config.get("vision_config") or {})})
        self.vision_tower = ClipTower(vision, [-1], keeps_class_token=True, ends_with_norm=True)
        self.multi_modal_projector = LinearProjector(vision.hidden_size, self.text.hidden_size)
