"""A fake engine that says given pieces, one output each, for a model with tools, thoughts and images."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import pytest

from sensorium.errors import EngineError
from sensorium.processors.base import Processor
from sensorium.prompt.formats.base import Delta
from sensorium.types import EngineOutput, EngineRequest, FinishReason, MediaFeatures, MediaItem, Modality
from support.api_support import EOS, STOP, TOKENIZER, FakeEngine, Script, Served, serving
from support.marked_format import MarkedFormat, marked


class Eyes(Processor):
    """An image is one row for every 8 x 8 pixels."""

    modalities = frozenset({"image"})

    def placeholder(self, kind: Modality, index: int) -> str:
        return "<|stop|>"

    def placeholder_id(self, kind: Modality) -> int:
        return STOP

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        return (height // 8) * (width // 8)

    def process(self, item: MediaItem) -> MediaFeatures:
        height, width = item.data.shape[:2]
        rows = self.num_tokens("image", height, width)
        return MediaFeatures("image", item.key, rows, {"pixels": np.zeros((rows, 1), np.float32)})


def says(*pieces: str | Sequence[Delta], ends: bool = True, fails: bool = False) -> Script:
    """One output for each piece, then the end: the model's own, or that of `max_tokens`."""
    texts = [piece if isinstance(piece, str) else marked(piece) for piece in pieces]

    async def script(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        for index, text in enumerate(texts):
            tokens = tuple(TOKENIZER.encode(text))
            reason: FinishReason | None = "length" if index == len(texts) - 1 and not ends and not fails else None
            yield EngineOutput(request.id, tokens, finish_reason=reason, cached_tokens=3 if index == 0 else 0)
        if fails:
            raise EngineError
        yield EngineOutput(request.id, (EOS,), finish_reason="stop", stop_token_id=EOS)

    return script


@pytest.fixture
def marked_format(monkeypatch: pytest.MonkeyPatch) -> MarkedFormat:
    """What every model of this test writes in."""
    made = MarkedFormat()
    monkeypatch.setattr("sensorium.serving.model.format_of", lambda *_: made)
    return made


def speaking(
    *pieces: str | Sequence[Delta],
    ends: bool = True,
    fails: bool = False,
    sees: bool = False,
    template: str | None = None,
    **options: Any,
) -> AbstractAsyncContextManager[Served]:
    """A server whose model says these pieces. `sees`: it takes images. `options` are those of `serving`."""
    model: dict[str, Any] = {"processor": Eyes} if sees else {}
    if template is not None:
        model["source"] = template
    return serving(FakeEngine(script=says(*pieces, ends=ends, fails=fails)), model=model, **options)


def prompt_of(request: EngineRequest) -> str:
    return TOKENIZER.decode(request.prompt.token_ids.tolist(), skip_special_tokens=False)


def prompts_of(requests: Iterable[EngineRequest]) -> list[str]:
    return [prompt_of(request) for request in requests]
