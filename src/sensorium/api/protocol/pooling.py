"""What all pooling endpoints' bodies share, and the bodies of /v1/embeddings, /pooling and /classify.

Each takes either `input` (texts or token ids) or `messages` (one conversation or several).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.chat import ProcessorKwargs, TemplateFields, TemplateKwargs
from sensorium.api.protocol.common import Body, Name, Priority, Text
from sensorium.api.protocol.completion import TokenIds
from sensorium.api.protocol.content import ChatMessage, Conversation, Messages, conversation
from sensorium.api.protocol.items import InputItem, is_item
from sensorium.api.protocol.other_servers import UNPROMPTED, VECTORS, Foreign
from sensorium.api.protocol.unions import LIST_OR_TEXT, TEXT_OR_OBJECT
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError
from sensorium.prompt.encode import Side
from sensorium.types import INT32_MAX, Modality, PoolingParams

MAX_INPUTS = 2**16
"""The operator's limit is the one that counts; this only bounds what is parsed."""

Encoding = Literal["float", "base64", "bytes", "bytes_only"]
NumberType = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]
PooledInput = str | list[int] | Conversation
"""One sequence that is asked for: text, token ids or a chat."""


def _input_form(value: Any) -> str:
    if not isinstance(value, list):
        return "<item>" if is_item(value) else "<text>"
    first = value[0] if value else None
    if isinstance(first, list):
        return "<many ids>"
    if is_item(first) or (isinstance(first, str) and any(map(is_item, value))):
        return "<items>"
    return "<texts>" if first is None or isinstance(first, str) else "<ids>"


TextOrItem = Annotated[Annotated[Text, Tag("<string>")] | Annotated[InputItem, Tag("<object>")], TEXT_OR_OBJECT]
InputField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS), Tag("<texts>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS), Tag("<many ids>")]
    | Annotated[InputItem, Tag("<item>")]
    | Annotated[list[TextOrItem], Field(min_length=1, max_length=MAX_INPUTS), Tag("<items>")],
    Discriminator(_input_form),
]


def _chat_form(value: Any) -> str:
    return "<many>" if isinstance(value, list) and value and isinstance(value[0], list) else "<one>"


ChatsField = Annotated[
    Annotated[Messages, Tag("<one>")]
    | Annotated[list[Messages], Field(min_length=1, max_length=MAX_INPUTS), Tag("<many>")],
    Discriminator(_chat_form),
]


class PoolingBody(Body, TemplateFields):
    """Fields of every endpoint that answers with vectors, classes or scores."""

    foreign: ClassVar[Mapping[str, Foreign]] = UNPROMPTED
    is_clipped: ClassVar[bool] = False
    """Whether prompts may be cut to more tokens than the context has, which then is the limit."""
    cut_by: ClassVar[str] = "`truncate_prompt_tokens`: -1"
    """The field and its value with which a request has its prompts cut to what the model takes, for errors."""

    model: Name | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Priority | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Text | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Name | None = None
    enable_thinking: bool | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    use_activation: bool | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        """Everything that can be refused before a prompt is made."""
        self.check_template(server)
        for name in ("normalize", "softmax", "activation"):
            if (self.model_extra or {}).get(name) is not None:
                raise RequestError(f"`{name}` is now called `use_activation`.", param=name, code="unsupported_field")
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "`truncate_prompt_tokens` must be at least 1, or -1 for as many as the model takes.",
                param="truncate_prompt_tokens",
            )

    @property
    def generates_prompt(self) -> bool:
        """Nothing is to be said after the last message, unless the request wants to pool there."""
        return bool(self.add_generation_prompt)

    @property
    def most_tokens(self) -> int | None:
        """To which a prompt is cut; -1 for as many as the model takes."""
        return self.truncate_prompt_tokens

    @property
    def cut_side(self) -> Side | None:
        return self.truncation_side


class SequencesBody(PoolingBody):
    """Any number of sequences, before whose texts one of the model's prompts may stand."""

    foreign: ClassVar[Mapping[str, Foreign]] = VECTORS

    @property
    def count(self) -> int:
        raise NotImplementedError

    def inputs(self, modalities: frozenset[Modality], limits: Limits) -> list[PooledInput]:
        """The sequences in order, checked against the limits and the model."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Where a sequence stands in the request."""
        raise NotImplementedError

    @property
    def field(self) -> str:
        """Where all of them stand."""
        return self.place(0).partition("[")[0]

    @property
    def name_of_prompt(self) -> str | None:
        """The prompt's name, if it is chosen by that."""
        return None

    @property
    def type_of_texts(self) -> str | None:
        """What the texts are, if that chooses the prompt."""
        return None

    @property
    def chooses(self) -> str | None:
        """The field that chooses a prompt, if one does."""
        return None


class InputBody(SequencesBody):
    """One or many sequences: `input` or `messages`."""

    foreign: ClassVar[Mapping[str, Foreign]] = UNPROMPTED
    input_name: ClassVar[str] = "input"

    input: InputField | None = None
    messages: ChatsField | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        if (self.input is None) == (self.messages is None):
            word = "Exactly one" if self.input is not None else "One"
            raise RequestError(
                f"{word} of `{self.input_name}` and `messages` is needed.",
                param=self.input_name,
                code=None if self.input is not None else "missing_required_parameter",
            )
        for index, item in enumerate(self._given_inputs()):
            if not item or (isinstance(item, InputItem) and item.plain == ""):
                where = self.place(index)
                raise RequestError(f"`{where}` must not be empty.", param=where)

    def inputs(self, modalities: frozenset[Modality], limits: Limits) -> list[PooledInput]:
        if self.messages is None:
            return [
                pooled_item(item, self.place(index), modalities, limits)
                for index, item in enumerate(self._given_inputs())
            ]
        chats = self.chats
        many = len(chats) > 1 or isinstance(self.messages[0], list)
        return [
            conversation(chat, modalities, limits, where=f"messages[{index}]" if many else "messages")
            for index, chat in enumerate(chats)
        ]

    @property
    def count(self) -> int:
        return len(self.chats) if self.messages is not None else len(self._given_inputs())

    def place(self, index: int) -> str:
        if self.input is None:
            return "messages"
        is_list = isinstance(self.input, list) and not isinstance(self.input[0], int)
        return f"{self.input_name}[{index}]" if is_list else self.input_name

    def _given_inputs(self) -> list[str] | list[list[int]] | list[str | InputItem]:
        given: Any = self.input
        if given is None:
            return []
        if isinstance(given, str | InputItem) or isinstance(given[0], int):
            return [given]
        many: list[str] | list[list[int]] = given
        return many

    @property
    def chats(self) -> list[list[ChatMessage]]:
        """Of `messages`, one or several."""
        given: Any = self.messages or []
        chats: list[list[ChatMessage]] = given if given and isinstance(given[0], list) else [given]
        return chats


def pooled_item(
    item: str | list[int] | InputItem, where: str, modalities: frozenset[Modality], limits: Limits
) -> PooledInput:
    """An item of text alone is a text like others."""
    if not isinstance(item, InputItem):
        return item
    return item.conversation(where, modalities, limits) if item.plain is None else item.plain


class PromptedBody(InputBody):
    """Texts before which one of the model's prompts may stand: chosen by name, or by what the texts are."""

    foreign: ClassVar[Mapping[str, Foreign]] = VECTORS

    prompt_name: Name | None = None
    input_type: Name | None = None

    @property
    def name_of_prompt(self) -> str | None:
        return self.prompt_name

    @property
    def type_of_texts(self) -> str | None:
        return self.input_type

    @property
    def chooses(self) -> str | None:
        return next((name for name in ("prompt_name", "input_type") if getattr(self, name) is not None), None)


class EncodedBody(PromptedBody):
    """How vectors are written; all but `encoding_format` is about vectors that are bytes."""

    encoding_format: Encoding | None = None
    embed_dtype: NumberType | None = None
    endianness: Endianness | None = None


VectorType = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
VectorTypes = Annotated[
    Annotated[VectorType, Tag("<string>")]
    | Annotated[list[VectorType], Field(min_length=1, max_length=len(get_args(VectorType))), Tag("<list>")],
    LIST_OR_TEXT,
]


class EmbeddingsRequest(EncodedBody):
    """The last four are Jina's, whose `embedding_type` may be a list: here of one type, since Jina's description of its
    API has no answer with several."""

    dimensions: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    embedding_type: VectorTypes | None = None
    task: Name | None = None
    normalized: bool | None = None
    truncate: bool | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        for ours, theirs in (
            ("encoding_format", "embedding_type"),
            ("input_type", "task"),
            ("use_activation", "normalized"),
            ("truncate_prompt_tokens", "truncate"),
        ):
            if getattr(self, ours) is not None and getattr(self, theirs) is not None:
                raise RequestError(f"`{theirs}` and `{ours}` say the same; give one of them.", param=theirs)

        if len(set(self._types)) > 1:
            raise RequestError(
                "`embedding_type` is one type at a time here; /v2/embed has several in one answer (`embedding_types`).",
                param="embedding_type",
            )

    @property
    def _types(self) -> list[VectorType]:
        given = self.embedding_type
        return given if isinstance(given, list) else [] if given is None else [given]

    @property
    def form(self) -> VectorType | None:
        """How vectors are written, where it says so by Jina's name."""
        return next(iter(self._types), None)

    @property
    def chooses(self) -> str | None:
        return "task" if self.task is not None else super().chooses

    @property
    def type_of_texts(self) -> str | None:
        return self.input_type if self.task is None else self.task

    @property
    def most_tokens(self) -> int | None:
        return -1 if self.truncate else self.truncate_prompt_tokens

    def params(self) -> PoolingParams:
        normalize = self.use_activation if self.normalized is None else self.normalized
        return PoolingParams("embed", normalize=normalize, dimensions=self.dimensions)


POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify", "sparse")


class PoolingRequest(EncodedBody):
    dimensions: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    task: Name | None = None

    def check(self, limits: Limits, server: ServerConfig) -> None:
        super().check(limits, server)
        if self.dimensions is not None:
            raise RequestError(
                "`dimensions` is not supported here; /v1/embeddings has it.",
                param="dimensions",
                code="unsupported_field",
            )
        if not set(self.tasks) <= set(POOLING_TASKS) or len(set(self.tasks)) < len(self.tasks):
            raise RequestError(
                f"`task` is one of {', '.join(POOLING_TASKS)}, or several of them joined by & (computed in one pass); "
                f"not {self.task!r}.",
                param="task",
            )
        if (len(self.tasks) > 1 or "sparse" in self.tasks) and self.encoding_format not in (None, "float"):
            raise RequestError(
                "`encoding_format` of sparse vectors, and of several tasks at once, is float.", param="encoding_format"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """() for the model's own."""
        return () if self.task is None else tuple(self.task.split("&"))


class ClassifyRequest(InputBody):
    def params(self) -> PoolingParams:
        return PoolingParams("classify", activation=self.use_activation)
