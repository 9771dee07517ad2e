"""Requests in the project's own types -> prompts: templates, tokenization, media, lengths, and what is wrong with them.

Everything that can be the client's fault is found here, and cheap checks run before expensive ones: template and counts
before fetching, sizes and context before decoding. Nothing that takes long runs on the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.pooling import PoolingSpec
from sensorium.config import ServerConfig
from sensorium.errors import NotAllowedError, RequestError
from sensorium.media.source import MediaSource
from sensorium.processors.base import Processor
from sensorium.prompt.encode import Ids, Truncation, encode_texts
from sensorium.prompt.messages import Message, TextPart
from sensorium.prompt.template import ChatTemplate
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.concurrency import PromptThreads
from sensorium.serving.lengths import ContextLimit
from sensorium.serving.media import Fetched, MediaPipeline, MediaSettings, MediaTiming
from sensorium.serving.templates import Templates
from sensorium.types import MediaFeatures, Prompt

SHORT_TEXT = 2000  # characters that are tokenized sooner than a thread takes over


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt and what it cost. `text_s` is rendering and tokenizing. `tail` is its text from the last turn's header
    on, for `OutputFormat.scanner`."""

    prompt: Prompt
    text_s: float
    media: tuple[MediaTiming, ...] = ()
    tail: str = ""


class RenderOptions(TypedDict, total=False):
    """How a conversation is rendered. `tools` are as OpenAI writes them; `pooled`: no completion follows, the prompt
    itself is looked at; `chat_template` is the request's own."""

    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]]
    chat_template: str | None
    pooled: bool


class PromptBuilder:
    """One model's prompts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        processor: Processor,
        *,
        templates: Templates,
        media: MediaPipeline,
        limit: ContextLimit,
        embedding_limit: ContextLimit | None = None,
        threads: PromptThreads,
        server: ServerConfig,
        pooling: PoolingSpec,
    ) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.vocab_size = checkpoint.vocab_size
        self._templates = templates
        self._media = media
        self._limit = limit
        self._embedding_limit = embedding_limit or limit
        self._threads = threads
        self._server = server
        self._pooling = pooling

    async def chat_prompt(self, messages: Sequence[Message], media: Sequence[MediaSource], **options: Any) -> Prompt:
        """`prepare_chat` for who does not count the time."""
        return (await self.prepare_chat(messages, media, **options)).prompt

    async def prepare_chat(
        self,
        messages: Sequence[Message],
        media: Sequence[MediaSource],
        *,
        add_special_tokens: bool = False,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        truncation: Truncation | None = None,
        tenant: bytes = b"",
        salt: bytes = b"",
        **options: Unpack[RenderOptions],
    ) -> Prepared:
        """Messages and their media, in order of appearance, as one prompt. Tenants take turns where they must wait;
        processed media are kept for those of the same `salt` only.

        Without `add_special_tokens` there is only what the checkpoint's processor adds: a multimodal model's BOS.
        """
        self._check_parts(messages, media, is_cut=truncation is not None)
        settings = self._settings(media, mm_processor_kwargs or {}, tenant, salt)
        template, text, text_s = await self._rendered(messages, tenant=tenant, **options)
        features: list[MediaFeatures] = []
        timings: list[MediaTiming] = []
        if media or truncation is None:
            features, timings = await self._processed(media, text, settings)
        else:
            text = truncation.shorten(text)
        begin = time.perf_counter()
        add = self._adds_special_tokens(text, add_special_tokens)
        prompt = await self._threads.run(
            not options.get("tools") and _is_small(messages) and len(media) <= 4,
            lambda: self._build(settings.processor, text, features, add),
            tenant,
            characters=len(text),
        )
        text_s += time.perf_counter() - begin
        if truncation is not None and len(prompt.token_ids) > truncation.max_tokens:
            prompt = _cut(prompt, truncation)
        self._limit.check(prompt, "messages")
        return Prepared(prompt, text_s, tuple(timings), template.tool_style.tail(text))

    def _check_parts(self, messages: Sequence[Message], media: Sequence[MediaSource], *, is_cut: bool) -> None:
        """Refuse too many media, and texts that no template makes short: escaping and rendering ten million characters
        hold others for long."""
        self._media.check(messages, media, self.processor.modalities)
        for message in messages:
            for part in message.content:
                if isinstance(part, TextPart) and not is_cut:
                    self._limit.check_text(part.text, "messages")

    async def media(
        self, sources: Sequence[MediaSource], *, tenant: bytes = b"", salt: bytes = b""
    ) -> tuple[list[MediaFeatures], list[MediaTiming]]:
        """Media that stand in no prompt, as the model's encoder takes them."""
        settings = MediaSettings(self.processor, {}, tenant, salt)
        with self._media.holding() as held:
            return await self._media.process(await self._media.fetch(sources, settings, held), settings)

    async def count_chat(
        self,
        messages: Sequence[Message],
        media: Sequence[MediaSource],
        *,
        add_special_tokens: bool = False,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        tenant: bytes = b"",
        salt: bytes = b"",
        **options: Unpack[RenderOptions],
    ) -> int:
        """Tokens of the prompt that `prepare_chat` would make, whether or not they fit. Media are measured, not
        decoded."""
        self._media.check(messages, media, self.processor.modalities)
        settings = self._settings(media, mm_processor_kwargs or {}, tenant, salt)
        _, text, _ = await self._rendered(messages, tenant=tenant, **options)
        with self._media.holding() as held:
            media_tokens = sum(item.num_tokens for item in await self._media.fetch(media, settings, held))
        adds = self._adds_special_tokens(text, add_special_tokens)

        def counted() -> int:
            special = self.tokenizer.encode("", add_special_tokens=True) if adds else []
            return self._count(text, settings.processor) + len(special)

        return media_tokens + await self._threads.run(len(text) <= SHORT_TEXT, counted, tenant)

    async def _rendered(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template: str | None = None,
        pooled: bool = False,
        tenant: bytes = b"",
    ) -> tuple[ChatTemplate, str, float]:
        """The prompt as text, what has written it, and the seconds that it took."""
        template = await self._templates.find(chat_template, tenant, pooled=pooled, has_tools=bool(tools))
        begin = time.perf_counter()
        small = not tools and _is_small(messages)
        variables = await self._threads.run(
            small,
            lambda: template.variables(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                kwargs=template_kwargs,
                tools=tools,
            ),
            tenant,
        )
        self._templates.note_unread(template.unread(template_kwargs or {}))
        text = await self._templates.render(template, variables, tenant, is_foreign=chat_template is not None)
        if continue_final_message:
            text = template.cut(text)
        return template, text, time.perf_counter() - begin

    async def encode(self, text: str, *, add_special_tokens: bool, tenant: bytes = b"") -> list[int]:
        """Token ids of a text in which special tokens are tokens."""

        def made() -> list[int]:
            self._limit.check_text(text, "prompt")
            return self.tokenizer.encode(self.tokenizer.sanitize(text), add_special_tokens=add_special_tokens)

        return await self._threads.run(len(text) <= SHORT_TEXT, made, tenant, characters=len(text))

    async def text_prompt(
        self,
        text_or_ids: str | Sequence[int],
        *,
        media: Sequence[MediaSource] = (),
        add_special_tokens: bool = True,
        truncation: Truncation | None = None,
        tenant: bytes = b"",
    ) -> Prompt:
        """A prompt without messages: text in which special tokens are tokens, or token ids. `media` go to the text's
        placeholders, which are the model's own, in order."""
        if len(text_or_ids) == 0:
            raise RequestError("The prompt is empty.", param="prompt", code="empty_prompt")
        if not isinstance(text_or_ids, str):
            prompt = self._prompt_of_request_ids(text_or_ids)
        elif media:
            text = self.tokenizer.sanitize(text_or_ids)
            prompt = (await self.prepare_text(text, media, tenant=tenant)).prompt
        else:
            text = self.tokenizer.sanitize(truncation.shorten(text_or_ids) if truncation else text_or_ids)
            prompt = await self._threads.run(
                len(text) <= SHORT_TEXT,
                lambda: self._build(self.processor, text, (), add_special_tokens, param="prompt"),
                tenant,
                characters=len(text),
            )
        if truncation is not None and len(prompt.token_ids) > truncation.max_tokens:
            prompt = _cut(prompt, truncation)
        self._limit.check(prompt, "prompt")
        return prompt

    async def prepare_text(
        self, text: str, media: Sequence[MediaSource], *, tenant: bytes = b"", salt: bytes = b"", param: str = "prompt"
    ) -> Prepared:
        """A text with the model's own placeholders of `media`, in order, as a prompt, whether or not it fits."""
        self._media.check_counts(media, self.processor.modalities)
        features, timings = await self._processed(media, text, self._settings(media, {}, tenant, salt))
        adds = self._adds_special_tokens(text, True)
        begin = time.perf_counter()
        prompt = await self._threads.run(
            False, lambda: self._build(self.processor, text, features, adds, param=param), tenant, characters=len(text)
        )
        return Prepared(prompt, time.perf_counter() - begin, tuple(timings))

    async def text_prompts(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        add_special_tokens: bool = True,
        truncation: Truncation | None = None,
        params: Sequence[str],
        embedded: bool = False,
        tenant: bytes = b"",
    ) -> list[Prompt]:
        """`text_prompt` of many, either all texts or all token ids, in one go. `params` says where each stands in the
        request. `embedded`: they may be longer than the context, if the operator has such texts embedded in chunks."""
        limit = self._embedding_limit if embedded else self._limit

        def made() -> list[Prompt]:
            rows = self._encoded(texts, add_special_tokens, truncation, params, limit)
            return [self.prompt_of_ids(row, param, limit=limit) for row, param in zip(rows, params, strict=True)]

        is_short = len(texts) == 1 and len(texts[0]) <= SHORT_TEXT
        return await self._threads.run(is_short, made, tenant, characters=sum(map(len, texts)))

    def unpooled_tokens(self, prompt: str, *, add_special_tokens: bool) -> int:
        """Tokens at the beginning that take no part in pooling where this prompt stands before a text and the
        checkpoint says so: the special tokens before the text are among them, as in sentence-transformers."""
        if self._pooling.include_prompt or not prompt:
            return 0
        ids = self._encoded([prompt], add_special_tokens, None, ["input"], self._limit)[0]
        return len(ids) - (len(ids) > 0 and int(ids[-1]) in self.tokenizer.special_ids)

    def _build(
        self,
        processor: Processor,
        text: str,
        features: Sequence[MediaFeatures],
        add_special_tokens: bool,
        param: str = "messages",
    ) -> Prompt:
        self._limit.check_text(text, param)
        try:
            prompt = processor.build(text, features, add_special_tokens=add_special_tokens)
        except RequestError as error:
            error.param = error.param or param
            raise
        if len(prompt.token_ids) == 0:
            raise RequestError("The prompt has no tokens.", param=param, code="empty_prompt")
        is_text = np.ones(len(prompt.token_ids), bool)
        for span in prompt.spans:  # their rows come from a tower, whatever the token's number
            is_text[span.offset : span.offset + span.length] = False
        self._check_in_table(prompt.token_ids[is_text], param)
        return prompt

    def _check_in_table(self, ids: Ids, param: str) -> None:
        """Tokens that a tokenizer knows and the checkpoint has no embedding of are refused, as token ids are."""
        vocab_size = self.vocab_size
        if len(ids) and (highest := int(ids.max())) >= vocab_size:
            raise RequestError(
                f"The text has the token {self.tokenizer.id_to_token(highest)!r} with the id {highest}, but this model "
                f"has embeddings of 0 to {vocab_size - 1} only. Leave it out.",
                param=param,
                code="invalid_token_id",
            )

    def _prompt_of_request_ids(self, token_ids: Sequence[int]) -> Prompt:
        ids = self._checked_ids(token_ids, "prompt")
        self._check_no_placeholders(ids, "prompt")
        positions, delta = self.processor.positions(ids, (), ())
        return Prompt(ids, positions=positions, position_delta=delta)

    def _checked_ids(self, token_ids: Sequence[int], param: str) -> Ids:
        vocab_size = self.vocab_size
        if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in token_ids):
            raise RequestError("Token ids must be integers.", param=param, code="invalid_token_id")
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise RequestError(
                f"Token ids of this model are 0 to {vocab_size - 1}.", param=param, code="invalid_token_id"
            )
        return np.array(token_ids, np.int32)

    def _check_no_placeholders(self, ids: Ids, param: str) -> None:
        # A family whose placeholder is text fills the rows' places with an ordinary token: that one is nothing special.
        placeholders = {self.processor.placeholder_id(kind) for kind in self.processor.modalities}
        placeholders &= self.tokenizer.special_ids | set(self.tokenizer.added_tokens.values())
        if placeholders and np.isin(ids, list(placeholders)).any():
            raise RequestError(
                "The prompt has placeholder tokens of media, but no media. Send media in `messages`.",
                param=param,
                code="media_count_mismatch",
            )

    def _encoded(
        self,
        texts: Sequence[str | Sequence[int]],
        add_special_tokens: bool,
        truncation: Truncation | None,
        params: Sequence[str],
        limit: ContextLimit,
    ) -> list[Ids]:
        strings = [text for text in texts if isinstance(text, str)]
        if not strings:
            rows = [self._checked_ids(ids, param) for ids, param in zip(texts, params, strict=True)]  # type: ignore[arg-type]
            return rows if truncation is None else [truncation.cut(row) for row in rows]
        if truncation is None:
            for text, param in zip(strings, params, strict=True):
                limit.check_text(text, param)
        if self._pooling.lower_case:
            strings = [text.lower() for text in strings]
        strings = [self.processor.cleaned(text) for text in strings]
        return encode_texts(self.tokenizer, strings, add_special_tokens=add_special_tokens, truncation=truncation)

    def prompt_of_ids(
        self, ids: Ids, param: str, token_types: Ids | None = None, *, limit: ContextLimit | None = None
    ) -> Prompt:
        if len(ids) == 0:
            raise RequestError("There is a text without tokens.", param=param, code="empty_prompt")
        self._check_in_table(ids, param)
        self._check_no_placeholders(ids, param)
        prompt = Prompt(ids, token_types=token_types)
        (limit or self._limit).check(prompt, param)
        return prompt

    def _adds_special_tokens(self, text: str, wanted: bool) -> bool:
        bos = self.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            return False
        return wanted or bool(self.processor.modalities)

    def _settings(
        self, media: Sequence[MediaSource], given: Mapping[str, Any], tenant: bytes, salt: bytes
    ) -> MediaSettings:
        """Of media that stand in one prompt; `given` is the request's `mm_processor_kwargs`."""
        if given and not self._server.allow_request_mm_kwargs:
            raise NotAllowedError("mm_processor_kwargs", "--allow-request-mm-kwargs")
        overrides = {**self.processor.implied([source.kind for source in media]), **given}
        return MediaSettings(self.processor.with_overrides(overrides), overrides, tenant, salt)

    async def _processed(
        self, media: Sequence[MediaSource], text: str, settings: MediaSettings
    ) -> tuple[list[MediaFeatures], list[MediaTiming]]:
        with self._media.holding() as held:
            fetched = await self._media.fetch(media, settings, held)
            await self._check_fits_before_decoding(fetched, text, settings)
            return await self._media.process(fetched, settings)

    async def _check_fits_before_decoding(self, media: Sequence[Fetched], text: str, settings: MediaSettings) -> None:
        media_tokens = sum(item.num_tokens for item in media)
        if media_tokens + len(text.encode()) <= self._limit.max_model_len:
            return  # no token is shorter than a byte
        text_tokens = await self._threads.run(
            len(text) <= SHORT_TEXT,
            lambda: self._count(text, settings.processor),
            settings.tenant,
            characters=len(text),
        )
        if media_tokens + text_tokens > self._limit.max_model_len:
            raise self._limit.too_long(text_tokens, [(one.raw.kind, one.num_tokens) for one in media], "messages")

    def _count(self, text: str, processor: Processor) -> int:
        self._limit.check_text(text, "messages")
        return processor.text_length(text)


def _cut(prompt: Prompt, truncation: Truncation) -> Prompt:
    if prompt.media:
        raise RequestError(
            f"The prompt has {len(prompt.token_ids)} tokens. One with media is not cut to `truncate_prompt_tokens`: "
            "leave the field out, or send less.",
            param="truncate_prompt_tokens",
        )
    return Prompt(truncation.cut(prompt.token_ids))


def _is_small(messages: Sequence[Message]) -> bool:
    if any(message.extra for message in messages):
        return False
    return (
        sum(len(part.text) for message in messages for part in message.content if isinstance(part, TextPart))
        <= SHORT_TEXT
    )
