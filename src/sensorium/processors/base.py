"""The contract between a model family and the prompt: sizes -> token counts, media -> features, text -> token ids.

`Processor` itself serves text-only models. A family overrides what differs; most only say their placeholder, count
and pixels. Instances are built once per model and used from several threads: methods keep no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint import Checkpoint
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, MediaSpan, Modality, Prompt


class Processor:
    modalities: ClassVar[frozenset[Modality]] = frozenset()

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        """`overrides` is `--mm-processor-kwargs`; a key that the family does not know is a StartupError naming it."""
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer

    def with_overrides(self, overrides: dict[str, Any]) -> Processor:
        """The same processor with a request's `mm_processor_kwargs`; RequestError names an unknown key or bad value."""
        raise NotImplementedError

    def placeholder(self, kind: Modality, index: int) -> str:
        """The text that stands for the index-th (0-based, per kind) medium in a prompt, for string-only templates."""
        raise NotImplementedError

    def placeholder_id(self, kind: Modality) -> int:
        """The token id that is repeated once per embedding row."""
        raise NotImplementedError

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        """Prompt tokens that a picture of this size takes, known before it is decoded. MediaError if it cannot be used."""
        raise NotImplementedError

    def process(self, item: MediaItem) -> MediaFeatures:
        """Resize, normalise, cut: what the tower eats. Pure; runs in worker threads."""
        raise NotImplementedError

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        """Tokenize rendered text and expand its placeholders to the media's rows, in order of appearance per kind.

        Raises RequestError when the number of placeholders and of media differ.
        """
        raise NotImplementedError

    def positions(self, token_ids: NDArray[np.int32], spans: Sequence[MediaSpan],
                  media: Sequence[MediaFeatures]) -> tuple[NDArray[np.int32] | None, int]:
        """(positions int32 [axes, tokens] or None for 0, 1, 2, …, position_delta); see `types.Prompt`."""
        return None, 0
