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
from sensorium.types import MediaFeatures, Modality, Prompt


class ShownProcessor(Processor):
    """A family says `placeholder_id` of each kind, the soft token whose places its rows take, and what is below."""

    def _mark(self, kind: Modality) -> str:
        """What in the prompt is replaced by a media item's text."""
        return self.placeholder(kind, 0)

    def _shown(self, media: MediaFeatures) -> str:
        """The text that takes the place of the media item's marker."""
        raise NotImplementedError

    def _counts(self, media: MediaFeatures) -> list[int]:
        """Rows that each soft token of this text stands for."""
        raise NotImplementedError

    def prompt_tokens(self, features: MediaFeatures) -> int:
        return features.num_rows + self._text_tokens(self._shown(features))

    def _text_tokens(self, shown: str) -> int:
        """Without the soft ones."""
        soft = self._soft_ids()
        return sum(token_id not in soft for token_id in self.tokenizer.encode(shown))

    def _soft_ids(self) -> set[int]:
        return {self.placeholder_id(kind) for kind in self.modalities}

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        kinds = {self._mark(kind): kind for kind in self.modalities}
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
                runs.append(PlaceholderRun(item, self.placeholder_id(media[item].kind), count, row))
                row += count
        soft = self._soft_ids()
        places = np.flatnonzero(np.isin(token_ids, list(soft))).tolist()
        if token_ids[places].tolist() != [run.token_id for run in runs]:
            names = ", ".join(str(self.tokenizer.id_to_token(one)) for one in sorted(soft))
            raise RequestError(
                f"The prompt's text holds {names}, which only media may bring.", code="media_count_mismatch"
            )
        start = 0
        for place, run in zip(places, runs, strict=True):
            yield token_ids[start:place]
            yield run
            start = place + 1
        yield token_ids[start:]


class NamedProcessor(ShownProcessor):
    """The same where the family's only soft token, `_soft`, is one of every such tokenizer, and `_fill` its id.
    StartupError where it is missing."""

    _soft: str
    _fill: int

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        found = self.tokenizer.token_to_id(self._soft)
        if found is None:
            raise StartupError(f"The tokenizer has no token {self._soft}, whose places an image's rows take.")
        self._fill = found
