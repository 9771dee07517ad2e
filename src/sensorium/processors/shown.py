"""Media that stand in prompts as text of their family's, with a soft token for every run of rows in it. That text is
tokenized together with the prompt: its line breaks may join those beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import RequestError, StartupError
from sensorium.processors.base import Piece, PlaceholderRun, Processor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, Prompt


class ShownProcessor(Processor):
    """A family says `_soft` and `_fill`, text and id of the token whose places rows take, and what is below."""

    _soft: str
    _fill: int

    def _shown(self, media: MediaFeatures) -> str:
        """The text that takes the place of the media item's marker."""
        raise NotImplementedError

    def _counts(self, media: MediaFeatures) -> list[int]:
        """Rows that each soft token of this text stands for."""
        raise NotImplementedError

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        kinds = {self.placeholder(kind, 0): kind for kind in self.modalities}
        pieces = re.split("(" + "|".join(map(re.escape, kinds)) + ")", text)
        found = [kinds[marker] for marker in pieces[1::2]]
        self._check_counts(found, media)
        items = {kind: iter([i for i, one in enumerate(media) if one.kind == kind]) for kind in self.modalities}
        order = [next(items[kind]) for kind in found]
        pieces[1::2] = [self._shown(media[item]) for item in order]
        token_ids = np.array(self.tokenizer.encode("".join(pieces), add_special_tokens=add_special_tokens), np.int32)
        return self._assemble(self._filled(token_ids, media, order), media)

    def _filled(
        self, token_ids: NDArray[np.int32], media: Sequence[MediaFeatures], order: Sequence[int]
    ) -> Iterator[Piece]:
        """Every soft token becomes the rows it stands for; the media's come in `order`."""
        runs = []
        for item in order:
            row = 0
            for count in self._counts(media[item]):
                runs.append(PlaceholderRun(item, self._fill, count, row))
                row += count
        places = np.flatnonzero(token_ids == self._fill).tolist()
        if len(places) != len(runs):
            raise RequestError(
                f"The prompt's text holds {self._soft}, which only media may bring.", code="media_count_mismatch"
            )
        start = 0
        for place, run in zip(places, runs, strict=True):
            yield token_ids[start:place]
            yield run
            start = place + 1
        yield token_ids[start:]


class NamedProcessor(ShownProcessor):
    """The same where the family's `_soft` is a token of every such tokenizer. StartupError where it is missing."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        found = self.tokenizer.token_to_id(self._soft)
        if found is None:
            raise StartupError(f"The tokenizer has no token {self._soft}, whose places an image's rows take.")
        self._fill = found
