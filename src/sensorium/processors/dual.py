"""CLIP and SigLIP: a prompt is a text or one image, which takes a single token."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.families import vision_tower
from sensorium.errors import RequestError
from sensorium.processors.base import PlaceholderRun, Processor
from sensorium.processors.square import Square
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt

PLACEHOLDER = "<image>"
CANONICAL = "SiglipTokenizer"
"""The class of tokenizers whose texts are made plain by code, not by tokenizer.json."""


class DualProcessor(Processor):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    literals: ClassVar[tuple[str, ...]] = (PLACEHOLDER,)

    def _configure(self) -> None:
        vision = self.checkpoint.config.get("vision_config") or {}
        tower = vision_tower(vision)
        side = vision.get("image_size") or 224
        named = str(self.checkpoint.tokenizer_config.get("tokenizer_class", ""))
        self._is_canonical = named.removesuffix("Fast") == CANONICAL
        self._square = Square.of(self.checkpoint.preprocessor, side, is_siglip=not tower.has_class_token)

    def placeholder(self, kind: Modality, index: int) -> str:
        return PLACEHOLDER if kind == "image" else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        """Behind the vocabulary: no text has this token."""
        return self.checkpoint.vocab_size if kind == "image" else super().placeholder_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        return 1 if kind == "image" else super().num_tokens(kind, height, width, frames)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        pixels = self._square.planes(item.data.astype(np.uint8, copy=False))
        arrays: dict[str, NDArray[np.generic]] = {"pixels": pixels}
        return MediaFeatures("image", self._feature_key(item), 1, arrays)

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        if not media:
            ids = self.tokenizer.encode(self.cleaned(text), add_special_tokens=add_special_tokens)
            return self._assemble([np.array(ids, np.int32)], media)
        self._check_counts(["image"] * text.count(PLACEHOLDER), media)
        if len(media) > 1 or text.replace(PLACEHOLDER, "").strip():
            raise RequestError(
                "This model makes a vector of a text or of one image, not of several things at once. Send each as an "
                "input of its own.",
                code="one_input",
            )
        return self._assemble([PlaceholderRun(0, self.placeholder_id("image"), 1)], media)

    def cleaned(self, text: str) -> str:
        return canonical(text) if self._is_canonical else text

    def text_length(self, text: str) -> int:
        return len(self.tokenizer.encode(self.cleaned(text.replace(PLACEHOLDER, ""))))


def canonical(text: str) -> str:
    """What SigLIP's first tokenizer does to a text before it cuts it into pieces: lower case, no ASCII punctuation, one
    space between words."""
    return re.sub(r"\s+", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).strip()
