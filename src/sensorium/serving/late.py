"""Queries and documents of models of late interaction: their token ids, which of their vectors count, and MaxSim."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.late_interaction import LateInteraction, Side
from sensorium.checkpoint.prompts import Role
from sensorium.prompt.encode import Ids, Truncation
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.concurrency import PromptThreads
from sensorium.serving.lengths import ContextLimit
from sensorium.serving.prompts import PromptBuilder
from sensorium.types import PoolingParams, Prompt

Vectors = NDArray[np.float32]


class LatePrompts:
    """Texts are cut to what the model was trained with, as its own library does it."""

    def __init__(
        self,
        spec: LateInteraction,
        prompts: PromptBuilder,
        limit: ContextLimit,
        threads: PromptThreads,
        *,
        filler: str | None,
    ) -> None:
        """`filler` expands queries where `spec` names no token."""
        self.spec = spec
        self._prompts = prompts
        self._limit = limit
        self._threads = threads
        self._filler = filler

    async def texts(
        self, texts: Sequence[str], role: Role, *, most: int | None, params: Sequence[str], tenant: bytes = b""
    ) -> list[tuple[Prompt, PoolingParams]]:
        """A prompt of each and how it is pooled. `most` are the request's tokens, `params` the places in it."""

        def made() -> list[tuple[Prompt, PoolingParams]]:
            found = []
            for text, param in zip(texts, params, strict=True):
                ids, unseen = self._ids(text, role, most)
                prompt = self._prompts.prompt_of_ids(ids, param)
                found.append((prompt, PoolingParams("token_embed", unseen_tokens=unseen)))
            return found

        return await self._threads.run(False, made, tenant, characters=sum(map(len, texts)))

    def counted(self, vectors: Vectors, prompt: Prompt, role: Role) -> Vectors:
        """Those of the tokens that take part in a comparison. [tokens, size]"""
        skipped = self._skipped[role]
        return vectors[~np.isin(prompt.token_ids, skipped)] if len(skipped) else vectors

    def score(self, query: Vectors, document: Vectors) -> float:
        """MaxSim: of every token of the query the most that it is like one of the document's, added up."""
        if not len(query) or not len(document):
            return 0.0
        best = (query @ document.T).max(1)
        return float(best.mean() if self.spec.is_mean else best.sum(dtype=np.float64))

    def _ids(self, text: str, role: Role, most: int | None) -> tuple[Ids, int]:
        """Token ids, and how many at the end nobody attends to."""
        tokenizer, side = self._prompts.tokenizer, self._side(role)
        expansion = self.spec.expansion if role == "query" else None
        longest = self._longest(side, most)
        if expansion is not None and expansion.is_fixed:
            longest = min(longest, expansion.length)
        first, last = self._frame
        marker, rest = self._markers[role]
        behind = tokenizer.encode(side.suffix) if side.suffix else []
        room = longest - len(first) - len(marker) - len(behind) - len(last)
        cut = Truncation(max(room, 1))
        inner = tokenizer.encode(tokenizer.sanitize(cut.shorten(rest + text)))[: max(room, 0)]
        ids = [*first, *marker, *inner, *behind, *last]
        missing = 0 if expansion is None else max(0, min(expansion.length, self._limit.max_model_len) - len(ids))
        filled = [*ids, *[self._filler_id] * missing] if self._filler_id is not None else ids
        unseen = 0 if expansion is None or expansion.is_seen else len(filled) - len(ids)
        return np.array(filled, np.int32), unseen

    def _side(self, role: Role) -> Side:
        return self.spec.query if role == "query" else self.spec.document

    def _longest(self, side: Side, most: int | None) -> int:
        return min(one for one in (self._limit.max_model_len, side.max_tokens, most) if one is not None)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Special tokens before and behind every text."""
        tokenizer = self._prompts.tokenizer
        inner = tokenizer.raw.encode_batch_fast(["a"], add_special_tokens=False)[0]
        whole = list(tokenizer.framed(inner).ids)
        start = next(i for i in range(len(whole)) if whole[i : i + len(inner.ids)] == list(inner.ids))
        before, first = whole[:start], tokenizer.token_to_id(self.spec.first) if self.spec.first else None
        if first is not None and before[:1] != [first]:
            before = [first, *before]
        return before, whole[start + len(inner.ids) :]

    @cached_property
    def _markers(self) -> dict[Role, tuple[list[int], str]]:
        """Ids that stand before the text, and what is left of the prefix."""
        return {role: _marker(self._prompts.tokenizer, self._side(role)) for role in ("query", "document")}

    @cached_property
    def _skipped(self) -> dict[Role, Ids]:
        tokenizer = self._prompts.tokenizer
        return {
            role: np.array(
                [one for word in self._side(role).skipped if (one := tokenizer.token_to_id(word)) is not None], np.int32
            )
            for role in ("query", "document")
        }

    @cached_property
    def _filler_id(self) -> int | None:
        token = (self.spec.expansion.token if self.spec.expansion else None) or self._filler
        return None if token is None else self._prompts.tokenizer.token_to_id(token)


def _marker(tokenizer: Tokenizer, side: Side) -> tuple[list[int], str]:
    words = side.prefix.split(None, 1) if side.marker else []
    for token in (side.prefix, words[0]) if words else ():
        if (one := tokenizer.token_to_id(token)) is not None:
            return [one], side.prefix[len(token) :]
    return [], side.prefix
