"""One served model as the API sees it: what it can do, and requests in the project's own types -> the engine's prompts.

Everything that can be the client's fault is answered here, the cheap checks before the dear ones: template and counts
before fetching, sizes and context before decoding. Nothing that takes long runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.checkpoint.labels import label_names
from sensorium.checkpoint.lengths import context_length
from sensorium.checkpoint.pooling import read_pooling
from sensorium.checkpoint.prompts import read_prompts
from sensorium.config import Limits, MiB, ServerConfig
from sensorium.errors import ContextLengthError, MediaError, RequestError, ServerError, StartupError
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource, RawMedia
from sensorium.media.turns import Turns
from sensorium.processors.base import Processor
from sensorium.prompt.builtin import is_embedder_name, is_embedder_template
from sensorium.prompt.encode import Ids, PairLimits, Side, Truncation, encode_pairs, encode_texts
from sensorium.prompt.inspection import Inspection, Renderer
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.renderer import RenderPool
from sensorium.prompt.template import (
    ChatTemplate,
    check_source,
    compiling,
    pooling_template_source,
    probes_of,
    reads_pairs,
    rendering,
    template_source,
)
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.features import FeatureCache, feature_key
from sensorium.types import MediaFeatures, Modality, PoolingTask, Prompt

if TYPE_CHECKING:
    from sensorium.ipc.client import EngineClient

T = TypeVar("T")
_log = logging.getLogger("sensorium")

SHORT_TEXT = 2000  # characters that are tokenized sooner than a thread takes over
SHORT_PAYLOAD = 64 * 1024  # bytes that are hashed sooner
LONG_TEXT = 1 << 20  # characters from which a text may be refused by its length alone
MAX_REQUEST_TEMPLATE = 64 * 1024  # characters
MAX_UNREAD_NAMES = 256
FEATURE_CACHE_BYTES = 64 * MiB
PAIRS_AT_ONCE = 8  # that are rendered at the same time
PAIR_SLACK = 64  # tokens by which a pair that was cut may be too long all the same, since texts are cut and not tokens
PAIR_ATTEMPTS = 4  # to cut it again
Task = PoolingTask | Literal["generate"]
TASKS: Mapping[str, tuple[Task, ...]] = {
    "generate": ("generate",),
    "embed": ("embed", "token_embed"),
    "classify": ("classify", "token_classify"),
    "reward": ("token_classify", "classify"),
    "score": ("score",),
    "pooling": ("classify", "token_classify", "score", "embed", "token_embed"),
    "auto": ("generate", "classify", "token_classify", "score", "embed", "token_embed"),
}
"""What --task leaves of what the model can do; the first that pools is what /pooling does if it is not told."""


@dataclass(frozen=True, slots=True)
class MediaTiming:
    """How long one medium took, queueing included. A cached one was only fetched."""

    kind: Modality
    fetch_s: float
    decode_s: float = 0.0
    process_s: float = 0.0
    cached: bool = False
    duration_s: float = 0.0  # the clip's own


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt and what it cost. `text_s` is rendering and tokenizing."""

    prompt: Prompt
    text_s: float
    media: tuple[MediaTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class _Fetched:
    raw: RawMedia
    key: bytes
    num_tokens: int
    fetch_s: float
    features: MediaFeatures | None


@dataclass(frozen=True, slots=True)
class _Settings:
    """What all media of a request have in common."""

    processor: Processor
    overrides: Mapping[str, Any]  # of the processor, by the request
    tenant: bytes
    salt: bytes


class ServedModel:
    """Built by `open`. `template` is None for models that cannot chat until they are given one."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        processor: Processor,
        client: EngineClient,
        loader: MediaLoader,
        renderer: Renderer,
        server: ServerConfig,
        limits: Limits,
        max_model_len: int | None = None,
        task: str = "auto",
        pooling_template: ChatTemplate | None = None,
    ) -> None:
        """`pooling_template` is for models that are embedded with other words than they chat with. `renderer` runs
        the templates; it is closed with this."""
        self.names = tuple(names)
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.template = template
        self.pooling_template = pooling_template or template
        self.processor = processor
        self.client = client
        self.created = int(time.time())
        self.media_limits = _media_limits(server, limits)
        self._task = task
        self._loader = loader
        self._renderer = renderer
        self._unread_names: set[str] = set()  # that were told in the log
        self._server = server
        self.prompts = read_prompts(checkpoint.folder)
        self._pooling = read_pooling(checkpoint.folder, "cls", checkpoint.pooling)
        self._wanted_len = max_model_len
        self._features = FeatureCache(FEATURE_CACHE_BYTES)
        self._threads = ThreadPoolExecutor(server.media_workers + 2, thread_name_prefix="prompt")
        self._turns = Turns(server.media_workers + 2, server.media_workers + 1)  # at the threads
        # Decoded media are large: no more of them at once than there are workers. One tenant never has all of them.
        self._decoding = Turns(server.media_workers + 1, server.media_workers)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        names: Sequence[str],
        server: ServerConfig,
        limits: Limits,
        loader: MediaLoader,
        client: EngineClient,
        max_model_len: int | None = None,
        task: str = "auto",
        renderer: Renderer | None = None,
    ) -> ServedModel:
        """Read what the HTTP process needs of a checkpoint. `max_model_len` and `task` are the flags."""
        tokenizer = Tokenizer.from_folder(checkpoint.folder, vocab_size=checkpoint.vocab_size)
        if beyond := [token for token, one in tokenizer.added_tokens.items() if one >= checkpoint.vocab_size]:
            _log.warning(
                "the tokenizer has %d tokens (%r, ...) beyond the model's %d embeddings: prompts with them are refused",
                len(beyond),
                beyond[0],
                checkpoint.vocab_size,
            )
        processor: Processor = load_class(checkpoint.family.processor)(
            checkpoint, tokenizer, dict(server.mm_processor_kwargs)
        )
        source = template_source(server.chat_template, checkpoint.chat_template, checkpoint.architecture, tokenizer)
        pooled = pooling_template_source(server.chat_template, (*names, *checkpoint.folder.parts[-3:]))
        renderer = renderer or RenderPool()
        return cls(
            names=names,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            processor=processor,
            client=client,
            loader=loader,
            renderer=renderer,
            server=server,
            limits=limits,
            max_model_len=max_model_len,
            task=task,
            template=None if source is None else _opened(source, processor, renderer),
            pooling_template=None if pooled is None else _opened(pooled, processor, renderer),
        )

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together: the least of checkpoint, flag and what the engine has room for."""
        ready = self.client.ready
        capacity = None if ready is None else ready.max_model_len
        return context_length(self.checkpoint.max_model_len, self._wanted_len, capacity)

    # What it can do.

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """What the model can do, whatever --task says. Empty until it is loaded."""
        ready = self.client.ready
        return () if ready is None else ready.tasks

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it does here."""
        can = self.all_tasks
        if self._task == "score" and "embed" in can and "classify" not in can:
            return ("embed",)  # an embedder scores by comparing vectors
        return tuple(task for task in TASKS[self._task] if task in can)

    @property
    def is_embedder(self) -> bool:
        """Whether its vectors were made to be compared: a model that generates must be told to be one, by its files,
        its name or the operator. Any decoder has states, but the angles between them mean nothing."""
        cached = (part for part in self.checkpoint.folder.parts[-3:] if part.startswith("models--"))
        names = (*self.names, self.checkpoint.folder.name, *cached)  # the hub's cache has folders named by commits
        return (
            "generate" not in self.all_tasks
            or self._pooling.is_stated
            or self._task == "embed"
            or is_embedder_name(names)
            or is_embedder_template(self._server.chat_template)
        )

    @property
    def default_pooling_task(self) -> PoolingTask | None:
        return next((task for task in self.tasks if task != "generate"), None)

    @property
    def matryoshka_sizes(self) -> tuple[int, ...] | None:
        """Sizes to which embeddings may be cut: () for any, None for none."""
        config, given = self.checkpoint.config, self._server.matryoshka_dimensions
        if given:
            return () if 0 in given else given
        listed = config.get("matryoshka_dimensions")
        if isinstance(listed, list) and listed:
            return tuple(size for size in listed if isinstance(size, int))
        return () if config.get("is_matryoshka") is True else None

    @property
    def labels(self) -> list[str]:
        """Names of a classifier's classes."""
        return label_names(self.checkpoint.config)

    def check_task(self) -> None:
        """StartupError if --task leaves nothing; only once the engine is ready."""
        if not self.tasks:
            raise StartupError(f"--task {self._task}: this model can only {', '.join(self.all_tasks)}")
        if "score" in self.tasks and self.checkpoint.text is not None and not self.has_pair_template:
            _log.warning(
                "this reranker has no template for pairs: the query and the document are put one after the "
                "other; --chat-template names one, whose messages have the roles query and document"
            )

    # Prompts.

    async def chat_prompt(self, messages: Sequence[Message], media: Sequence[MediaSource], **options: Any) -> Prompt:
        """`prepare_chat` for who does not count the time."""
        return (await self.prepare_chat(messages, media, **options)).prompt

    async def prepare_chat(
        self,
        messages: Sequence[Message],
        media: Sequence[MediaSource],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        pooled: bool = False,
        truncation: Truncation | None = None,
        tenant: bytes = b"",
        salt: bytes = b"",
    ) -> Prepared:
        """Messages and their media, in order of appearance, as one prompt. Tenants take turns where they must wait;
        processed media are kept for those of the same `salt` only.

        `add_special_tokens` False adds nothing but what the checkpoint's processor would: a BOS that a multimodal
        model's template leaves to the tokenizer. `pooled`: no answer follows, the prompt itself is looked at.
        """
        self._check_media(messages, media)
        processor = self._processor_for(mm_processor_kwargs or {})
        template = await self._template_for(chat_template, self.pooling_template if pooled else self.template, tenant)
        begin = time.perf_counter()
        small = _is_small(messages)
        variables = await self._run(
            small,
            lambda: template.variables(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                kwargs=template_kwargs,
            ),
            tenant,
        )
        self._note_unread(template.unread(template_kwargs or {}))
        with rendering():
            text = await self._renderer.render(template.source, variables, tenant, is_foreign=chat_template is not None)
        if continue_final_message:
            text = template.cut(text)
        text_s = time.perf_counter() - begin
        settings = _Settings(processor, mm_processor_kwargs or {}, tenant, salt)
        features, timings = await self._media_features(media, settings, text)
        begin = time.perf_counter()
        add = self._adds_special_tokens(text, add_special_tokens)
        prompt = await self._run(small and len(media) <= 4, lambda: self._build(processor, text, features, add), tenant)
        text_s += time.perf_counter() - begin
        if truncation is not None and not prompt.media:
            prompt = Prompt(truncation.cut(prompt.token_ids))
        self._check_fits(prompt, "messages")
        return Prepared(prompt, text_s, tuple(timings))

    async def encode(self, text: str, *, add_special_tokens: bool, tenant: bytes = b"") -> list[int]:
        """Token ids of a text in which special tokens are tokens."""

        def made() -> list[int]:
            self._check_length_unread(text, "prompt")
            return self.tokenizer.encode(self.tokenizer.sanitize(text), add_special_tokens=add_special_tokens)

        return await self._run(len(text) <= SHORT_TEXT, made, tenant)

    async def text_prompt(
        self, text_or_ids: str | Sequence[int], *, add_special_tokens: bool = True, tenant: bytes = b""
    ) -> Prompt:
        """A prompt without messages: text in which special tokens are tokens, or token ids."""
        if len(text_or_ids) == 0:
            raise RequestError("The prompt is empty.", param="prompt", code="empty_prompt")
        if isinstance(text_or_ids, str):
            text = self.tokenizer.sanitize(text_or_ids)
            prompt = await self._run(
                len(text) <= SHORT_TEXT,
                lambda: self._build(self.processor, text, (), add_special_tokens, param="prompt"),
                tenant,
            )
        else:
            prompt = self._prompt_of_ids(text_or_ids)
        self._check_fits(prompt, "prompt")
        return prompt

    async def text_prompts(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        add_special_tokens: bool = True,
        truncation: Truncation | None = None,
        params: Sequence[str],
        tenant: bytes = b"",
    ) -> list[Prompt]:
        """`text_prompt` of many, either all texts or all token ids, in one go. `params` says where each stands in the
        request."""

        def made() -> list[Prompt]:
            rows = self._encoded(texts, add_special_tokens, truncation, params)
            return [self._prompt_of_array(row, param) for row, param in zip(rows, params, strict=True)]

        return await self._run(len(texts) == 1 and len(texts[0]) <= SHORT_TEXT, made, tenant)

    async def pair_prompts(
        self, pairs: Sequence[tuple[str, str]], limits: PairLimits, *, params: Sequence[str], tenant: bytes = b""
    ) -> list[Prompt]:
        """Two texts each as one prompt, for cross-encoders. `params` says where the second one stands.

        Through the template for pairs, if the model has one; the model's default prompt stands before the first text,
        or is the template's system message.
        """
        if self.has_pair_template:
            found: list[Prompt] = []
            for start in range(0, len(pairs), PAIRS_AT_ONCE):
                some = slice(start, start + PAIRS_AT_ONCE)
                found += await all_in_order(
                    self._templated(query, document, limits, param, tenant)
                    for (query, document), param in zip(pairs[some], params[some], strict=True)
                )
            return found
        pairs = [(self.prompts.default + query, document) for query, document in pairs]

        def made() -> list[Prompt]:
            if not limits.shortens_documents:
                for pair, param in zip(pairs, params, strict=True):
                    self._check_length_unread(max(pair, key=len), param)
            rows = encode_pairs(self.tokenizer, pairs, limits)
            return [
                self._prompt_of_array(ids, param, types if has_types else None)
                for (ids, types), param in zip(rows, params, strict=True)
            ]

        has_types = self.checkpoint.config.get("type_vocab_size", 0) > 1
        return await self._run(False, made, tenant)

    @property
    def has_pair_template(self) -> bool:
        """Whether a decoder that scores reads its pairs through a template: the operator's, or the checkpoint's own if
        it knows the roles of a query and a document (what a chat model left behind does not)."""
        if self.checkpoint.text is None or self.template is None or "score" not in self.all_tasks:
            return False
        return self._server.chat_template is not None or reads_pairs(self.checkpoint.chat_template)

    async def _templated(self, query: str, document: str, limits: PairLimits, param: str, tenant: bytes) -> Prompt:
        """One pair through the template; the document is cut where the pair is to be, so that the end stays."""
        query = self._first_tokens(query, limits.max_query_tokens or None)
        document = self._first_tokens(document, limits.max_document_tokens or None)
        await asyncio.sleep(0)  # there may be thousands
        if limits.total is None:
            return await self._pair(query, document, param, tenant)
        slack = Truncation(limits.total + PAIR_SLACK)
        room = limits.total - len((await self._pair(query, "", param, tenant, slack)).token_ids)
        for _ in range(PAIR_ATTEMPTS):
            if room < 0:
                break
            prompt = await self._pair(query, self._first_tokens(document, room), param, tenant, slack)
            excess = len(prompt.token_ids) - limits.total
            if excess <= 0:
                return prompt
            room -= excess
        raise ContextLengthError(
            f"The query and the template leave no room for a document: the two may have {limits.total} tokens.",
            param=param,
        )

    async def _pair(
        self, query: str, document: str, param: str, tenant: bytes, truncation: Truncation | None = None
    ) -> Prompt:
        system = self.prompts.default
        messages = [
            Message(role, (TextPart(text),))
            for role, text in (("system", system), ("query", query), ("document", document))
            if text or role != "system"
        ]
        try:
            prepared = await self.prepare_chat(
                messages, (), add_generation_prompt=False, truncation=truncation, tenant=tenant
            )
        except RequestError as error:
            error.param = param
            raise
        return prepared.prompt

    def _first_tokens(self, text: str, count: int | None) -> str:
        """The text of its first tokens; all of it with None."""
        if count is None:
            return text
        text = Truncation(max(count, 1)).shorten(text)
        ids = self.tokenizer.encode(self.tokenizer.escape(text))
        return text if len(ids) <= count else self.tokenizer.decode(ids[:count], skip_special_tokens=False)

    def unpooled_tokens(self, prompt: str, *, add_special_tokens: bool) -> int:
        """Tokens at the beginning that take no part in pooling where this prompt stands before a text and the
        checkpoint says so: the special tokens before the text are among them, as in sentence-transformers."""
        if self._pooling.include_prompt or not prompt:
            return 0
        ids = self._encoded([prompt], add_special_tokens, None, ["input"])[0]
        return len(ids) - (len(ids) > 0 and int(ids[-1]) in self.tokenizer.special_ids)

    def truncation(self, wanted: int | None, side: Side | None) -> Truncation | None:
        """What a request's `truncate_prompt_tokens` means here: -1 is as many as the model takes."""
        if wanted is None:
            return None
        if wanted > self.max_model_len:
            raise RequestError(
                f"`truncate_prompt_tokens` is {wanted}, more than this model's context of {self.max_model_len} tokens.",
                param="truncate_prompt_tokens",
            )
        default: Side = "left" if self.checkpoint.tokenizer_config.get("truncation_side") == "left" else "right"
        return Truncation(self.max_model_len if wanted == -1 else wanted, side or default)

    async def aclose(self) -> None:
        await self._renderer.aclose()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # Text.

    def _build(
        self,
        processor: Processor,
        text: str,
        features: Sequence[MediaFeatures],
        add_special_tokens: bool,
        param: str = "messages",
    ) -> Prompt:
        self._check_length_unread(text, param)
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
        vocab_size = self.checkpoint.vocab_size
        if len(ids) and (highest := int(ids.max())) >= vocab_size:
            raise RequestError(
                f"The text has the token {self.tokenizer.id_to_token(highest)!r} with the id {highest}, but this model "
                f"has embeddings of 0 to {vocab_size - 1} only. Leave it out.",
                param=param,
                code="invalid_token_id",
            )

    def _prompt_of_ids(self, token_ids: Sequence[int]) -> Prompt:
        ids = self._checked_ids(token_ids, "prompt")
        self._check_no_placeholders(ids, "prompt")
        positions, delta = self.processor.positions(ids, (), ())
        return Prompt(ids, positions=positions, position_delta=delta)

    def _checked_ids(self, token_ids: Sequence[int], param: str) -> Ids:
        vocab_size = self.checkpoint.vocab_size
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
    ) -> list[Ids]:
        strings = [text for text in texts if isinstance(text, str)]
        if not strings:
            rows = [self._checked_ids(ids, param) for ids, param in zip(texts, params, strict=True)]  # type: ignore[arg-type]
            return rows if truncation is None else [truncation.cut(row) for row in rows]
        if truncation is None:
            for text, param in zip(strings, params, strict=True):
                self._check_length_unread(text, param)
        if self._pooling.lower_case:
            strings = [text.lower() for text in strings]
        return encode_texts(self.tokenizer, strings, add_special_tokens=add_special_tokens, truncation=truncation)

    def _prompt_of_array(self, ids: Ids, param: str, token_types: Ids | None = None) -> Prompt:
        if len(ids) == 0:
            raise RequestError("There is a text without tokens.", param=param, code="empty_prompt")
        self._check_in_table(ids, param)
        self._check_no_placeholders(ids, param)
        prompt = Prompt(ids, token_types=token_types)
        self._check_fits(prompt, param)
        return prompt

    def _adds_special_tokens(self, text: str, wanted: bool) -> bool:
        bos = self.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            return False
        return wanted or bool(self.processor.modalities)

    def _processor_for(self, settings: Mapping[str, Any]) -> Processor:
        if settings and not self._server.allow_request_mm_kwargs:
            raise RequestError(
                "This server takes no mm_processor_kwargs from requests (--allow-request-mm-kwargs).",
                param="mm_processor_kwargs",
                code="mm_processor_kwargs_not_allowed",
            )
        return self.processor.with_overrides(dict(settings)) if settings else self.processor

    async def _template_for(self, source: str | None, default: ChatTemplate | None, tenant: bytes) -> ChatTemplate:
        if source is None:
            if default is None:
                raise RequestError(
                    "This model has no chat template. Start the server with --chat-template.",
                    param="messages",
                    code="no_chat_template",
                )
            return default
        if not self._server.allow_request_chat_template:
            raise RequestError(
                "This server takes no chat_template from requests (--allow-request-chat-template).",
                param="chat_template",
                code="chat_template_not_allowed",
            )
        if len(source) > MAX_REQUEST_TEMPLATE:
            raise RequestError(
                f"chat_template is longer than {MAX_REQUEST_TEMPLATE} characters.", param="chat_template"
            )
        probes = probes_of(self.processor.modalities, self.tokenizer)
        try:
            with compiling():
                found = await self._renderer.inspect(source, probes, tenant)
        except StartupError as error:
            raise RequestError(error.message, param="chat_template") from None
        return _chat_template(source, self.processor, found)

    def _note_unread(self, names: Iterable[str]) -> None:
        """Say once per name that the template does not read it; a client must not fill the log or the memory."""
        for name in names:
            short = name[:64]
            if short not in self._unread_names and len(self._unread_names) < MAX_UNREAD_NAMES:
                self._unread_names.add(short)
                _log.warning("template variable %r is ignored: the chat template does not read it", short)

    # Media.

    def _check_media(self, messages: Sequence[Message], media: Sequence[MediaSource]) -> None:
        places = [part.kind for message in messages for part in message.content if isinstance(part, MediaPart)]
        if places != [source.kind for source in media]:
            raise ServerError
        counts: Counter[Modality] = Counter()
        for source in media:
            kind = source.kind
            if kind not in self.processor.modalities:
                raise MediaError(f"This model takes no {kind} input.", param=source.param, code="unsupported_modality")
            counts[kind] += 1
            if counts[kind] > self.media_limits[kind]:
                raise RequestError(
                    f"At most {self.media_limits[kind]} {kind}(s) may be given in one request, but it "
                    f"has {places.count(kind)}. The operator sets this with --limit-mm-per-prompt.",
                    param=source.param,
                    code=f"too_many_{kind}s",
                )

    async def _media_features(
        self, sources: Sequence[MediaSource], settings: _Settings, text: str
    ) -> tuple[list[MediaFeatures], list[MediaTiming]]:
        if not sources:
            return [], []
        fetched = await all_in_order(self._fetch(source, settings) for source in sources)
        await self._check_fits_before_decoding(fetched, text, settings)
        first_of = {medium.key: medium for medium in reversed(fetched)}  # a picture given twice is decoded once
        made = await all_in_order(self._made(medium, settings) for medium in first_of.values())
        by_key = dict(zip(first_of, made, strict=True))
        timings = [
            by_key[one.key][1] if first_of[one.key] is one else MediaTiming(one.raw.kind, one.fetch_s, cached=True)
            for one in fetched
        ]
        return [by_key[medium.key][0] for medium in fetched], timings

    async def _fetch(self, source: MediaSource, settings: _Settings) -> _Fetched:
        begin = time.perf_counter()
        processor = settings.processor
        raw = await self._loader.fetch(source, settings.tenant)
        key = await self._run(
            len(raw.payload) <= SHORT_PAYLOAD,
            lambda: feature_key(raw.kind, raw.declared_type, raw.payload, settings.overrides, settings.salt),
            settings.tenant,
        )
        fetch_s = time.perf_counter() - begin
        features = self._features.get(key)
        if features is not None:
            return _Fetched(raw, key, features.num_rows, fetch_s, features)
        size = self._loader.probe(raw, sampling=processor.video_sampling(), sample_rate=processor.sample_rate)
        try:
            count = processor.num_tokens(raw.kind, size.height, size.width, size.frames)
        except MediaError as error:
            error.param = error.param or raw.param
            raise
        return _Fetched(raw, key, count, fetch_s, None)

    async def _made(self, medium: _Fetched, settings: _Settings) -> tuple[MediaFeatures, MediaTiming]:
        kind, processor = medium.raw.kind, settings.processor
        duration_s = medium.raw.info.duration_s if medium.raw.info is not None else 0.0
        if medium.features is not None:
            return medium.features, MediaTiming(kind, medium.fetch_s, cached=True, duration_s=duration_s)
        begin = time.perf_counter()
        async with self._decoding.taken(settings.tenant):
            item = await self._loader.decode(
                medium.raw,
                sampling=processor.video_sampling(),
                sample_rate=processor.sample_rate,
                tenant=settings.tenant,
            )
            decoded = time.perf_counter()
            features = await self._run(False, lambda: processor.process(item), settings.tenant)
        self._features.put(medium.key, features)
        return features, MediaTiming(
            kind, medium.fetch_s, decoded - begin, time.perf_counter() - decoded, duration_s=duration_s
        )

    # Context.

    def _check_length_unread(self, text: str, param: str) -> None:
        """Refuse what cannot fit however well it is tokenized: tokenizing ten million characters takes seconds."""
        if len(text) > LONG_TEXT and (fewest := self.tokenizer.fewest_tokens(text)) > self.max_model_len:
            raise ContextLengthError(
                f"This model's context is {self.max_model_len} tokens; the text alone, with "
                f"{len(text)} characters, is at least {fewest}. Shorten it.",
                param=param,
            )

    async def _check_fits_before_decoding(self, media: Sequence[_Fetched], text: str, settings: _Settings) -> None:
        media_tokens = sum(medium.num_tokens for medium in media)
        if media_tokens + len(text.encode()) <= self.max_model_len:
            return  # no token is shorter than a byte
        text_tokens = await self._run(
            len(text) <= SHORT_TEXT, lambda: self._count(text, settings.processor), settings.tenant
        )
        if media_tokens + text_tokens > self.max_model_len:
            raise self._too_long(text_tokens, [(one.raw.kind, one.num_tokens) for one in media], "messages")

    def _count(self, text: str, processor: Processor) -> int:
        self._check_length_unread(text, "messages")
        return processor.text_length(text)

    def _check_fits(self, prompt: Prompt, param: str) -> None:
        if len(prompt.token_ids) <= self.max_model_len:
            return
        media = [
            (one.kind, sum(span.length for span in prompt.spans if span.item == item))
            for item, one in enumerate(prompt.media)
        ]
        text_tokens = len(prompt.token_ids) - sum(count for _, count in media)
        raise self._too_long(text_tokens, media, param)

    def _too_long(self, text_tokens: int, media: Sequence[tuple[Modality, int]], param: str) -> ContextLengthError:
        seen: Counter[Modality] = Counter()
        parts = [f"text {text_tokens}"]
        for kind, count in media:
            seen[kind] += 1
            parts.append(f"{kind} {seen[kind]} {count}")
        total = text_tokens + sum(count for _, count in media)
        advice = "Shorten it or send fewer or smaller media." if media else "Shorten it."
        return ContextLengthError(
            f"This model's context is {self.max_model_len} tokens, but the prompt has {total}: "
            f"{', '.join(parts)}. {advice}",
            param=param,
        )

    async def _run(self, inline: bool, work: Callable[[], T], tenant: bytes = b"") -> T:
        """Work that holds a CPU: at once if it is short, else in a thread, when it is the tenant's turn."""
        if inline:
            return work()
        return await self._turns.run(self._threads, tenant, work)


def _opened(source: str, processor: Processor, renderer: Renderer) -> ChatTemplate:
    """A template of the operator's. StartupError if it is none or takes too much."""
    check_source(source)
    with compiling():
        found = renderer.inspect_now(source, probes_of(processor.modalities, processor.tokenizer))
    return _chat_template(source, processor, found)


def _chat_template(source: str, processor: Processor, inspection: Inspection) -> ChatTemplate:
    tokenizer = processor.tokenizer.with_literals(processor.literals, special=True)
    return ChatTemplate(
        source, tokenizer, inspection, modalities=processor.modalities, placeholder=processor.placeholder
    )


def _media_limits(server: ServerConfig, limits: Limits) -> dict[Modality, int]:
    """Media per request: what --limit-mm-per-prompt says of a kind, else the general limit."""
    general: dict[Modality, int] = {"image": limits.max_images, "video": limits.max_videos, "audio": limits.max_audios}
    return {kind: server.limit_mm_per_prompt.get(kind, count) for kind, count in general.items()}


def _is_small(messages: Sequence[Message]) -> bool:
    if any(message.extra for message in messages):
        return False
    return (
        sum(len(part.text) for message in messages for part in message.content if isinstance(part, TextPart))
        <= SHORT_TEXT
    )


async def all_in_order(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first failure cancels the rest and is the one that is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await _end(tasks)
        raise
    finally:
        tasks.clear()  # a task keeps its error, the error this frame: such a circle would hold the request's media


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
