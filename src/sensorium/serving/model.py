"""One served model: its names, its tasks and limits, and the parts that make prompts for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.checkpoint.known_names import known_embedder
from sensorium.checkpoint.labels import label_names
from sensorium.checkpoint.late_interaction import read_late_interaction
from sensorium.checkpoint.lengths import context_length, token_types
from sensorium.checkpoint.pair_templates import reads_instructions, reads_pairs
from sensorium.checkpoint.prompts import read_prompts
from sensorium.checkpoint.tokens import special_token
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError, StartupError
from sensorium.media.loader import MediaLoader
from sensorium.processors.base import Processor
from sensorium.prompt.builtin import OF_BARE_TEXTS, folder_names, is_embedder_name, is_embedder_template
from sensorium.prompt.encode import PairLimits, Side, Truncation
from sensorium.prompt.grammars import GrammarPool
from sensorium.prompt.inspection import Renderer
from sensorium.prompt.renderer import RenderPool
from sensorium.prompt.template import pooling_template_source, template_source
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.concurrency import PromptThreads
from sensorium.serving.defaults import ModelDefaults
from sensorium.serving.late import LatePrompts
from sensorium.serving.lengths import ContextLimit
from sensorium.serving.media import FEATURE_CACHE_BYTES, MediaPipeline, media_limits
from sensorium.serving.pairs import PairOptions, PairPrompts, PairSide
from sensorium.serving.prompts import PromptBuilder
from sensorium.serving.tasks import TASK_FLAGS, Task
from sensorium.serving.templates import OwnTemplates, Templates, format_of, opened
from sensorium.system.nursery import Nursery
from sensorium.types import PoolingTask, Prompt

if TYPE_CHECKING:
    from sensorium.ipc.client import EngineClient

_log = logging.getLogger("sensorium")


class ServedModel:
    """Built by `open`. `template`, of chats, is None for models that cannot chat until they are given one. `format` is
    how the model writes tool calls and reasoning; None if it does neither."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        templates: OwnTemplates,
        processor: Processor,
        client: EngineClient,
        loader: MediaLoader,
        renderer: Renderer,
        server: ServerConfig,
        limits: Limits,
        max_model_len: int | None = None,
        task: str = "auto",
        nursery: Nursery | None = None,
    ) -> None:
        """`renderer` runs the templates; it is closed with this. `nursery` is where workers for grammars come from."""
        self.names = tuple(names)
        self.checkpoint = checkpoint
        self.tokenizer, self.template, self.processor = tokenizer, templates.chat, processor
        self.client = client
        client.vocabulary = tokenizer.vocabulary(checkpoint.stop_token_ids)
        self.grammars = GrammarPool(
            client.vocabulary, checkpoint.vocab_size, memory_bytes=limits.prompt_memory, nursery=nursery
        )
        self.created = int(time.time())
        self._server = server
        self.instructions = read_prompts(checkpoint.folder, checkpoint.config)
        self._pooling = checkpoint.embedding
        self._wanted_len, self.task, self._max_logprobs = max_model_len, task, limits.max_logprobs
        cuts_left = checkpoint.tokenizer_config.get("truncation_side") == "left"
        self._limit = ContextLimit(tokenizer, lambda: self.max_model_len, cuts_left=cuts_left)
        self._threads = PromptThreads(server.media_workers + 2)
        declared = checkpoint.tokenizer_config.get("response_template")
        self.format = format_of(templates.tools or templates.chat, tokenizer, server, declared)
        self._templates = Templates(templates, processor=processor, renderer=renderer, server=server)
        self.prompts = self._prompt_builder(loader, limits)
        self._pairs, self.late = self._pair_prompts(), self._late_prompts()

    def _pair_prompts(self) -> PairPrompts:
        encoder = self.checkpoint.family.encoder
        return PairPrompts(
            self.prompts,
            self._limit,
            self._threads,
            system=self.instructions.default,
            has_types=encoder is not None and token_types(self.checkpoint.config, encoder) > 1,
        )

    def _late_prompts(self) -> LatePrompts | None:
        """How a model of late interaction reads queries and documents; None for others."""
        checkpoint = self.checkpoint
        if not self._pooling.is_per_token and checkpoint.family.tasks != ("token_embed",):
            return None
        config = checkpoint.tokenizer_config
        filler = special_token(config, "mask") or special_token(config, "eos")
        spec = checkpoint.family.late or read_late_interaction(
            checkpoint.folder, is_colbert=checkpoint.family.is_colbert
        )
        return LatePrompts(spec, self.prompts, self._limit, self._threads, filler=filler)

    def _prompt_builder(self, loader: MediaLoader, limits: Limits) -> PromptBuilder:
        server = self._server
        return PromptBuilder(
            self.checkpoint,
            self.tokenizer,
            self.processor,
            templates=self._templates,
            media=MediaPipeline(
                loader,
                self._threads,
                media_limits(server, limits),
                server.media_workers,
                min(FEATURE_CACHE_BYTES, limits.media_memory // 8),
            ),
            limit=self._limit,
            embedding_limit=self._embedding_limit(limits),
            threads=self._threads,
            server=server,
            pooling=self._pooling,
        )

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
        nursery: Nursery | None = None,
    ) -> ServedModel:
        """Read what the HTTP process needs of a checkpoint. `max_model_len` and `task` are the flags."""
        tokenizer = _open_tokenizer(checkpoint)
        processor: Processor = load_class(checkpoint.family.processor)(
            checkpoint, tokenizer, dict(server.mm_processor_kwargs)
        )
        source = template_source(server.chat_template, checkpoint.chat_template, checkpoint.architecture, tokenizer)
        of_tools = checkpoint.tool_template if server.chat_template is None else None
        pooled = pooling_template_source(server.chat_template, (*names, *checkpoint.folder.parts[-3:]))
        renderer = renderer or RenderPool(memory_bytes=limits.prompt_memory, nursery=nursery)
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
            nursery=nursery,
            templates=OwnTemplates(
                *(None if one is None else opened(one, processor, renderer) for one in (source, of_tools, pooled))
            ),
        )

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together: the least of checkpoint, flag and what the engine has room for."""
        ready = self.client.ready
        capacity = None if ready is None else ready.max_model_len
        return context_length(self.checkpoint.max_model_len, self._wanted_len, capacity)

    @property
    def defaults(self) -> ModelDefaults:
        """What it brings to sampling."""
        return ModelDefaults.of(
            self.checkpoint.generation,
            max_model_len=self.max_model_len,
            vocab_size=self.checkpoint.vocab_size,
            stop_token_ids=self.checkpoint.stop_token_ids,
            max_logprobs=self._max_logprobs,
            tokenizer=self.tokenizer,
        )

    def _embedding_limit(self, limits: Limits) -> ContextLimit:
        """Of a text that is embedded, which may be longer than the context where that is done in chunks."""
        if not self._server.embed_in_chunks:
            advice = "The operator can have longer texts embedded in chunks: --embed-in-chunks."
            return ContextLimit(self.tokenizer, lambda: self.max_model_len, cuts_left=False, raised_by=advice)
        longest = self._server.max_embed_len or limits.max_embedding_tokens
        flag = "--max-embed-len" if self._server.max_embed_len else "--max-embedding-tokens"
        return ContextLimit(
            self.tokenizer,
            lambda: max(longest, self.max_model_len),
            cuts_left=False,
            name="The longest text that is embedded in chunks",
            raised_by=f"The operator can allow more: {flag}.",
        )

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
        if self.task == "score" and "classify" not in can and {"embed", "token_embed"} & set(can):
            return ("token_embed",) if self.late else ("embed",)  # an embedder scores by comparing vectors
        return tuple(task for task in TASK_FLAGS[self.task].tasks if task in can)

    @property
    def is_embedder(self) -> bool:
        """Whether its vectors were made to be compared: a model that generates must be told to be one, by its files,
        its name or the operator. Any decoder has states, but the angles between them mean nothing."""
        names = (*self.names, *folder_names(self.checkpoint.folder))
        return (
            "generate" not in self.all_tasks
            or self._pooling.is_stated
            or self.task == "embed"
            or is_embedder_name(names)
            or is_embedder_template(self._server.chat_template)
        )

    @property
    def embeds_texts_as_chats(self) -> bool:
        template = self._templates.own.fitting(pooled=True)
        return template is not None and template.source in OF_BARE_TEXTS

    @property
    def pooling_kinds(self) -> tuple[str, ...]:
        """Which token states an embedding is made of."""
        return self._pooling.kinds

    @property
    def normalizes(self) -> bool:
        """Whether embeddings have the length 1 unless a request says otherwise."""
        return self._pooling.normalize

    @property
    def default_pooling_task(self) -> PoolingTask | None:
        return next((task for task in self.tasks if task != "generate" if task != "transcribe"), None)

    @property
    def matryoshka_sizes(self) -> tuple[int, ...] | None:
        """Sizes to which embeddings may be cut: () for any, None for none."""
        config, given = self.checkpoint.config, self._server.matryoshka_dimensions
        if given:
            return () if 0 in given else given
        listed = config.get("matryoshka_dimensions")
        if isinstance(listed, list) and listed:
            return tuple(size for size in listed if isinstance(size, int))
        return () if config.get("is_matryoshka") is True else known_embedder(self.checkpoint.folder).sizes

    @property
    def labels(self) -> list[str]:
        """Names of a classifier's classes."""
        return label_names(self.checkpoint.config)

    def check_task(self) -> None:
        """StartupError if --task leaves nothing; only once the engine is ready."""
        if not self.tasks:
            raise StartupError(f"--task {self.task}: this model can only {', '.join(self.all_tasks)}")
        if "score" in self.tasks and self.checkpoint.text is not None and not self.has_pair_template:
            _log.warning(
                "this reranker has no template for pairs: the query and the document are put one after the "
                "other; --chat-template names one, whose messages have the roles query and document"
            )

    @property
    def has_pair_template(self) -> bool:
        """Whether a decoder that scores reads its pairs through a template: the operator's, or the checkpoint's own if
        it knows the roles of a query and a document (what a chat model left behind does not)."""
        if self.checkpoint.text is None or self.template is None or "score" not in self.all_tasks:
            return False
        return self._server.chat_template is not None or reads_pairs(self.checkpoint.chat_template)

    # Prompts.

    def truncation(self, wanted: int | None, side: Side | None, *, completion: int | None = None) -> Truncation | None:
        """What a request's `truncate_prompt_tokens` means here: -1 is as many as the model takes beside `completion`
        tokens (None: nothing is generated)."""
        return self._limit.truncation(wanted, side, completion=completion)

    async def pair_prompts(
        self,
        pairs: Sequence[tuple[PairSide, PairSide]],
        limits: PairLimits,
        *,
        params: Sequence[str],
        options: PairOptions | None = None,
    ) -> list[Prompt]:
        """Two texts each as one prompt, for cross-encoders: through the template for pairs, if the model has one, and
        then with media too. `params` says where the second text of each stands in the request. RequestError if an
        instruction has no place."""
        options = options or PairOptions()
        if self.has_pair_template:
            if options.instruction is not None and not (self.template and reads_instructions(self.template.source)):
                raise _no_place("this model's template for pairs has no place for one (a message of the role system)")
            return await self._pairs.templated(pairs, limits, params=params, options=options)
        if options.instruction is not None:
            raise _no_place("this model reads the two texts and nothing else")
        texts = [(query, document) for query, document in pairs if isinstance(query, str) and isinstance(document, str)]
        if len(texts) < len(pairs):
            raise RequestError("This model compares texts only.", param=params[0], code="unsupported_modality")
        return await self._pairs.joined(texts, limits, params=params, tenant=options.tenant)

    async def aclose(self) -> None:
        await self._templates.aclose()
        await self.grammars.aclose()
        self._threads.close()


def _no_place(why: str) -> RequestError:
    return RequestError(f"`instruction`: {why}. Leave it out.", param="instruction", code="unsupported_field")


def _open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(checkpoint.folder, vocab_size=checkpoint.vocab_size)
    _warn_of_tokens_beyond(tokenizer, checkpoint.vocab_size)
    end = known_embedder(checkpoint.folder).end
    return tokenizer if end is None else tokenizer.ending_with(end)


def _warn_of_tokens_beyond(tokenizer: Tokenizer, vocab_size: int) -> None:
    if beyond := [token for token, one in tokenizer.added_tokens.items() if one >= vocab_size]:
        _log.warning(
            "the tokenizer has %d tokens (%r, ...) beyond the model's %d embeddings: prompts with them are refused",
            len(beyond),
            beyond[0],
            vocab_size,
        )
