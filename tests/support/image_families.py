"""What the vision tests share: a checkpoint record and a word tokenizer in memory, and pictures of noise."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.processors.qwen2_vl import Qwen2VLProcessor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
QWEN_FILE = {
    **CLIP,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
QWEN_TOKENS = {
    "<s>": 151643,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


class WordTokenizer:
    """Special tokens get the ids they are given; every other character is its code point."""

    def __init__(self, special: dict[str, int]) -> None:
        self.special = special
        self._split = re.compile("(" + "|".join(re.escape(token) for token in special) + ")")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids = [self.special["<s>"]] if add_special_tokens else []
        for part in self._split.split(text):
            ids += [self.special[part]] if part in self.special else [ord(c) for c in part]
        return ids

    def token_to_id(self, token: str) -> int | None:
        return self.special.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return next((token for token, one in self.special.items() if one == token_id), None)


def word_tokenizer(special: dict[str, int]) -> Tokenizer:
    """What a processor asks a tokenizer for is all that it has."""
    return cast(Tokenizer, WordTokenizer(special))


def record(config: dict[str, Any], preprocessor: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        folder=Path(),
        architecture="",
        config=config,
        preprocessor=preprocessor,
        generation={},
        tokenizer_config={},
        chat_template=None,
        text=None,
        dtype="float32",
        max_model_len=4096,
        vocab_size=64064,
        stop_token_ids=(),
        weight_files=(),
    )


def pixels_of(features: MediaFeatures) -> NDArray[np.float32]:
    return features.arrays["pixels"].astype(np.float32, copy=False)


def noise(height: int, width: int, *, frames: int | None = None, seed: int = 0) -> MediaItem:
    """A picture (or a video) of smooth noise, so that resizing has something to do."""
    shape = (height, width, 3) if frames is None else (frames, height, width, 3)
    data = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    kind: Modality = "image" if frames is None else "video"
    return MediaItem(kind, data, hashlib.sha256(data.tobytes() + repr(shape).encode()).digest(), param="messages[0]")


def normalised(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Qwen's patches as transformers' processors give them: [patches, 3 * depth * patch * patch], float32."""
    pixels = arrays["pixels"].reshape(len(arrays["pixels"]), 3, -1).astype(np.float32)
    patches: np.ndarray = (pixels * arrays["scale"][:, None] + arrays["shift"][:, None]).reshape(len(pixels), -1)
    return patches


def qwen(file: dict[str, Any] = QWEN_FILE, **overrides: Any) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(record({}, file), cast(Tokenizer, WordTokenizer(QWEN_TOKENS)), overrides)
