"""Two texts as one prompt, for cross-encoders: through a template for pairs, or one put after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.errors import ContextLengthError, RequestError
from sensorium.media.source import MediaSource
from sensorium.prompt.encode import PairLimits, Truncation, encode_pairs
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.serving.concurrency import PromptThreads, all_in_order
from sensorium.serving.lengths import ContextLimit
from sensorium.serving.prompts import PromptBuilder
from sensorium.types import Prompt

PAIRS_AT_ONCE = 8  # that are rendered at the same time
PAIR_SLACK = 64  # tokens by which a pair that was cut may be too long all the same, since texts are cut and not tokens
PAIR_ATTEMPTS = 4  # to cut it again


@dataclass(frozen=True, slots=True)
class Said:
    """One side of a pair that is more than a text: its parts in order, and where their media come from."""

    parts: tuple[TextPart | MediaPart, ...]
    media: tuple[MediaSource, ...]


PairSide = str | Said


@dataclass(frozen=True, slots=True)
class PairOptions:
    """What all pairs of a request share. `instruction` is what the template is told of the task; tenant, salt and the
    last two are as for `PromptBuilder.prepare_chat`."""

    tenant: bytes = b""
    salt: bytes = b""
    instruction: str | None = None
    template_kwargs: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Rendering:
    """One request's way from a pair to a prompt, through the template."""

    prompts: PromptBuilder
    system: str
    options: PairOptions

    async def __call__(
        self, query: PairSide, document: PairSide, param: str, truncation: Truncation | None = None
    ) -> Prompt:
        sides = (("system", self.system), ("query", query), ("document", document))
        said = [(role, Said((TextPart(one),), ()) if isinstance(one, str) else one) for role, one in sides]
        media = [source for _, one in said for source in one.media]
        try:
            prepared = await self.prompts.prepare_chat(
                [Message(role, one.parts) for role, one in said if self.system or role != "system"],
                media,
                add_generation_prompt=False,
                template_kwargs=self.options.template_kwargs,
                mm_processor_kwargs=self.options.mm_processor_kwargs,
                truncation=truncation,
                tenant=self.options.tenant,
                salt=self.options.salt,
            )
        except RequestError as error:
            if not media or error.param in (None, "messages"):
                error.param = param
            raise
        return prepared.prompt


class PairPrompts:
    """`system` is the model's default prompt: it stands before the first text, or is the template's system message,
    where a request does not say by its `instruction` what the task is. `has_types`: the model tells the texts apart by
    token types."""

    def __init__(
        self, prompts: PromptBuilder, limit: ContextLimit, threads: PromptThreads, *, system: str, has_types: bool
    ) -> None:
        self._prompts = prompts
        self._limit = limit
        self._threads = threads
        self._system = system
        self._has_types = has_types

    async def templated(
        self,
        pairs: Sequence[tuple[PairSide, PairSide]],
        limits: PairLimits,
        *,
        params: Sequence[str],
        options: PairOptions,
    ) -> list[Prompt]:
        """Through the template. `params` says where the second side of each pair stands in the request."""
        system = self._system if options.instruction is None else options.instruction
        render = _Rendering(self._prompts, system, options)
        found: list[Prompt] = []
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            some = slice(start, start + PAIRS_AT_ONCE)
            found += await all_in_order(
                self._templated(query, document, limits, param, render)
                for (query, document), param in zip(pairs[some], params[some], strict=True)
            )
        return found

    async def joined(
        self, pairs: Sequence[tuple[str, str]], limits: PairLimits, *, params: Sequence[str], tenant: bytes = b""
    ) -> list[Prompt]:
        """One text after the other. `params` as above."""
        pairs = [(self._system + query, document) for query, document in pairs]

        def made() -> list[Prompt]:
            if not limits.shortens_documents:
                for pair, param in zip(pairs, params, strict=True):
                    self._limit.check_text(max(pair, key=len), param)
            rows = encode_pairs(self._prompts.tokenizer, pairs, limits)
            return [
                self._prompts.prompt_of_ids(ids, param, types if has_types else None)
                for (ids, types), param in zip(rows, params, strict=True)
            ]

        has_types = self._has_types
        return await self._threads.run(False, made, tenant)

    async def _templated(
        self, query: PairSide, document: PairSide, limits: PairLimits, param: str, render: _Rendering
    ) -> Prompt:
        """One pair through the template; the document is cut where the pair is to be, so that the end stays. What has
        media is not cut."""
        if isinstance(query, Said) or isinstance(document, Said):
            if (isinstance(query, Said) and limits.max_query_tokens) or (
                isinstance(document, Said) and limits.max_document_tokens
            ):
                raise RequestError(
                    "Texts are cut to a number of tokens, what has media is not: leave the limit out.", param=param
                )
            return await render(query, document, param, None if limits.total is None else Truncation(limits.total))
        query = self._first_tokens(query, limits.max_query_tokens or None)
        document = self._first_tokens(document, limits.max_document_tokens or None)
        await asyncio.sleep(0)  # there may be thousands
        if limits.total is None:
            return await render(query, document, param)
        slack = Truncation(limits.total + PAIR_SLACK)
        room = limits.total - len((await render(query, "", param, slack)).token_ids)
        for _ in range(PAIR_ATTEMPTS):
            if room < 0:
                break
            prompt = await render(query, self._first_tokens(document, room), param, slack)
            excess = len(prompt.token_ids) - limits.total
            if excess <= 0:
                return prompt
            room -= excess
        raise ContextLengthError(
            f"The query and the template leave no room for a document: the two may have {limits.total} tokens.",
            param=param,
        )

    def _first_tokens(self, text: str, count: int | None) -> str:
        """The text of its first tokens; all of it with None."""
        if count is None:
            return text
        text = Truncation(max(count, 1)).shorten(text)
        ids = self._prompts.tokenizer.encode(self._prompts.tokenizer.escape(text))
        return text if len(ids) <= count else self._prompts.tokenizer.decode(ids[:count], skip_special_tokens=False)
