"""LLaVA-1.5: every image becomes one square of the tower's size and as many tokens as the tower has patches.

`ClipGeometry` and `image_token` are shared with LLaVA-NeXT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import vision_tower
from sensorium.errors import CheckpointError
from sensorium.processors import image
from sensorium.processors.base import ImageProcessor, Setting, boolean
from sensorium.processors.square import Square
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality


@dataclass(frozen=True, slots=True)
class ClipGeometry:
    """What the tower of a LLaVA checkpoint expects, in pixels and patches. Defaults are transformers' own."""

    image_size: int
    patch_size: int
    has_class_token: bool  # CLIP's towers, not SigLIP's
    keeps_first_row: bool  # vision_feature_select_strategy "full"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ClipGeometry:
        vision = config.get("vision_config") or {"image_size": 336, "patch_size": 14}
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise CheckpointError(f"config.json: vision_feature_select_strategy {strategy!r} is unknown")
        tower = vision_tower(vision)
        patch = vision.get("patch_size", tower.patch_size)
        return cls(vision.get("image_size", 224), patch, tower.has_class_token, strategy == "full")

    @property
    def side(self) -> int:
        """Patches along each edge of a square."""
        return self.image_size // self.patch_size

    @property
    def num_rows(self) -> int:
        """What the tower gives of one square."""
        return self.side**2 + self.has_class_token - (not self.keeps_first_row)


def image_token(config: Mapping[str, Any]) -> int:
    """The id that config.json repeats for every row of an image."""
    token_id: int = config.get("image_token_index", config.get("image_token_id", 32000))
    return token_id


class LlavaProcessor(ImageProcessor):
    settings: ClassVar[Mapping[str, Setting]] = {"do_pad": boolean}

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        self._fill = image_token(checkpoint.config)
        self._text, self._marker = self._find_marker("<image>", self._fill)

    def _configure(self) -> None:
        files = self.checkpoint.preprocessor
        self.geometry = ClipGeometry.of(self.checkpoint.config)
        self._square = Square.of(files, self.geometry.image_size)
        self._pads = self._setting("do_pad", False)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        return self.geometry.num_rows

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        pixels = item.data.astype(np.uint8, copy=False)
        if self._pads:
            pixels = image.pad_to_square(pixels, self._square.pad_color)
        rows = self.num_tokens("image", *item.data.shape[:2])
        arrays: dict[str, NDArray[np.generic]] = {"pixels": self._square.planes(pixels)}
        return MediaFeatures("image", self._feature_key(item), rows, arrays)
