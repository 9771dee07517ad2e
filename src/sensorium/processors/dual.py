"""CLIP and SigLIP: a prompt is a text or one image, which takes a single token."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling
from tokenizers import normalizers

from sensorium.checkpoint.families import vision_tower
from sensorium.checkpoint.values import square
from sensorium.errors import CheckpointError, RequestError
from sensorium.processors import image
from sensorium.processors.base import PlaceholderRun, Processor, Setting, integer
from sensorium.processors.square import Square
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt

PLACEHOLDER = "<image>"
MAX_PATCHES = 1 << 14  # of a setting
SCALE_STEP = 1e-5
CANONICAL = "SiglipTokenizer"
"""The class of tokenizers whose texts are made plain by code, not by tokenizer.json."""
LOWERED = frozenset({"GemmaTokenizer", "Siglip2Tokenizer"})
"""What files of SigLIP 2 name. Its training texts are in lower case (Tschannen et al. 2025). Most of the
files name Gemma's, which does not make them so."""
_LOWER_CASE = normalizers.Lowercase()


class DualProcessor(Processor):
    modalities: frozenset[Modality] = frozenset({"image"})
    literals: ClassVar[tuple[str, ...]] = (PLACEHOLDER,)

    def _configure(self) -> None:
        named = str(self.checkpoint.tokenizer_config.get("tokenizer_class", ""))
        self._is_canonical = named.removesuffix("Fast") == CANONICAL
        self._is_lowered = named.removesuffix("Fast") in LOWERED
        self._configure_images(self.checkpoint.config.get("vision_config") or {})

    def _configure_images(self, vision: dict[str, Any]) -> None:
        side, is_siglip = vision.get("image_size") or 224, not vision_tower(vision).has_class_token
        self._square = Square.of(self.checkpoint.preprocessor, side, is_siglip=is_siglip)

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
        return MediaFeatures("image", self._feature_key(item), 1, self._arrays(item.data.astype(np.uint8, copy=False)))

    def _arrays(self, pixels: image.Pixels) -> dict[str, NDArray[np.generic]]:
        return {"pixels": self._square.planes(pixels)}

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
        if self._is_lowered:
            return str(_LOWER_CASE.normalize_str(text))
        return canonical(text) if self._is_canonical else text

    def text_length(self, text: str) -> int:
        return len(self.tokenizer.encode(self.cleaned(text.replace(PLACEHOLDER, ""))))


class NaflexProcessor(DualProcessor):
    """An image keeps its aspect and becomes at most so many patches."""

    settings: ClassVar[Mapping[str, Setting]] = {"max_num_patches": integer(1, MAX_PATCHES)}

    def _configure(self) -> None:
        super()._configure()
        self._is_lowered = True  # there is no SigLIP of the first kind among these

    def _configure_images(self, vision: dict[str, Any]) -> None:
        files = self.checkpoint.preprocessor
        self._patch = square(vision, "patch_size", 16)
        if files.get("patch_size", self._patch) != self._patch:
            raise CheckpointError("preprocessor_config.json: 'patch_size' is not config.json's")
        self._most: int = self._setting("max_num_patches", 256)
        self._resample = image.resample_filter(files, Resampling.BILINEAR)
        self._normalization = image.Normalization.of(files, image.HALF, image.HALF)

    def _arrays(self, pixels: image.Pixels) -> dict[str, NDArray[np.generic]]:
        height, width = pixels.shape[:2]
        lines, columns = naflex_grid(height, width, self._patch, self._most)
        resized = image.resize(pixels, lines * self._patch, columns * self._patch, self._resample)
        return {
            "pixels": image.patches([resized], (1, lines, columns), self._patch, 1),
            "grids": np.array([[lines, columns]], np.int32),
            "scale": self._normalization.scale.reshape(3),
            "shift": self._normalization.shift.reshape(3),
        }


def naflex_grid(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """(lines, columns) of patches at the largest scale that has no more than `most`, found by halving."""

    def grid(scale: float) -> tuple[int, int]:
        return max(math.ceil(height * scale / patch), 1), max(math.ceil(width * scale / patch), 1)

    low, high = SCALE_STEP / 10, 100.0
    while high - low >= SCALE_STEP:
        middle = (low + high) / 2
        lines, columns = grid(middle)
        low, high = (middle, high) if lines * columns <= most else (low, middle)
    return grid(low)


def canonical(text: str) -> str:
    """What SigLIP's first tokenizer does to a text before it cuts it into pieces: lower case, no ASCII punctuation, one
    space between words."""
    return re.sub(r"\s+", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).strip()
