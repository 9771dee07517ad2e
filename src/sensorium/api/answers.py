"""What endpoints answer with, for the description alone: nothing is made of these models when a request is answered.

Imported only when somebody asks for the description. A test drives every route and holds its answers to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, RootModel


class Answer(BaseModel):
    """Fields with a default are not always there."""

    model_config = ConfigDict(protected_namespaces=())


class Open(Answer):
    """With further fields, which the model's files or the request name."""

    model_config = ConfigDict(protected_namespaces=(), extra="allow")


# OpenAI's and vLLM's


class PromptDetails(Answer):
    cached_tokens: int
    multimodal_tokens: dict[str, int] | None


class CompletionDetails(Answer):
    reasoning_tokens: int


class TokenUsage(Answer):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails | None
    completion_tokens_details: CompletionDetails | None = None


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class LikelyToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[LikelyToken]
    refusal: None


class RankedToken(Answer):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]


class ToolCallFunction(Answer):
    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: ToolCallFunction


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletionAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None = None
    system_fingerprint: None
    service_tier: None


class FunctionDelta(Answer):
    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Answer):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None
    prompt_token_ids: list[int] | None = None


class TextLogprobs(Answer):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(Answer):
    """Of a stream's event without the prompt's log-probabilities and, but for the last, without a stop reason."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class TextCompletionAnswer(Answer):
    """`usage` and `system_fingerprint` are those of the whole answer; a stream's event has them where it was asked."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage | None = None
    system_fingerprint: None = None


class InputTokensAnswer(Answer):
    object: Literal["chat.input_tokens", "response.input_tokens"]
    input_tokens: int


class ResponseTokenDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: ResponseTokenDetails
    output_tokens: int
    output_tokens_details: CompletionDetails
    total_tokens: int


class ResponseItem(Open):
    """A message, reasoning or a call, by its `type`."""

    id: str
    type: Literal["message", "reasoning", "function_call", "custom_tool_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseAnswer(Answer):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(Open):
    type: str
    sequence_number: int


class EmbeddingRow(Answer):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingsAnswer(Answer):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingRow]
    usage: TokenUsage


class TokenWeight(Answer):
    index: int
    value: float


PoolingData = list[float] | list[list[float]] | list[TokenWeight] | str


class PoolingRow(Answer):
    """An object by task where several were asked for."""

    index: int
    object: Literal["pooling"]
    data: PoolingData | dict[str, PoolingData]


class PoolingAnswer(Answer):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PoolingRow]
    usage: TokenUsage


class ClassRow(Answer):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyAnswer(Answer):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassRow]
    usage: TokenUsage


class ScoreRow(Answer):
    index: int
    object: Literal["score"]
    score: float


class ScoreAnswer(Answer):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreRow]
    usage: TokenUsage


class RankedDocument(Answer):
    text: str | None
    multi_modal: dict[str, Any] | None


class RankedRow(Answer):
    index: int
    document: RankedDocument | None = None
    relevance_score: float


class RankingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Ranking(Answer):
    id: str
    model: str
    usage: RankingUsage
    results: list[RankedRow]
    meta: dict[str, Any] | None = None


class RankedText(Answer):
    index: int
    score: float
    text: str | None = None


class RerankAnswer(RootModel[Ranking | list[RankedText]]):
    """The list is for requests with `texts`, as text-embeddings-inference has it."""


class TranscriptionUsage(Answer):
    type: Literal["duration"]
    seconds: int


class TranscriptionAnswer(Open):
    """With `verbose_json` also the task, language, duration, segments and words."""

    text: str
    usage: TranscriptionUsage | None = None


class TranscriptionEvent(Open):
    id: str
    object: Literal["transcription.chunk"]
    choices: list[dict[str, Any]]


class ModelLoading(Answer):
    phase: str
    progress: float


class ModelMemory(Answer):
    """Bytes."""

    weights: int
    kv_cache: int
    adapters: int
    resident: int


class ModelCapabilities(Answer):
    """As Mistral's clients read them."""

    completion_chat: bool
    function_calling: bool
    reasoning: bool
    vision: bool
    audio: bool
    classification: bool


class ModelRow(Answer):
    """Anthropic's clients, which send `anthropic-version`, get another `type`, and neither `capabilities` nor
    `max_context_length`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    tasks: list[str]
    modalities: list[str]
    state: str
    error: str | None
    loading: ModelLoading | None
    memory: ModelMemory | None
    adapters: list[str]
    type: Literal["base", "model"]
    capabilities: ModelCapabilities | None = None
    max_context_length: int | None = None
    display_name: str
    created_at: str
    lifecycle: str
    max_input_tokens: int | None
    max_tokens: int | None


class ModelsAnswer(Answer):
    object: Literal["list"]
    data: list[ModelRow]
    has_more: bool
    first_id: str
    last_id: str


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Answer):
    prompt: str


# Anthropic's


class MessageUsage(Answer):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class ContentBlock(Open):
    type: Literal["text", "thinking", "tool_use"]


class MessageAnswer(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    stop_sequence: str | None
    stop_details: None = None
    usage: MessageUsage


class MessageEvent(Open):
    type: str


class CountAnswer(Answer):
    input_tokens: int


# Cohere's and text-embeddings-inference's

Vectors = list[list[float]] | list[list[int]] | list[str]


class CohereEmbedAnswer(Answer):
    id: str
    texts: list[str]
    embeddings: Vectors | dict[str, Vectors]
    meta: dict[str, Any]
    response_type: Literal["embeddings_by_type", "embeddings_floats"]


class TeiVectors(RootModel[list[list[float]]]):
    pass


class TeiTokenVectors(RootModel[list[list[list[float]]]]):
    pass


class TeiWeights(RootModel[list[list[TokenWeight]]]):
    pass


class TeiClass(Answer):
    score: float
    label: str


class TeiClasses(RootModel[list[TeiClass] | list[list[TeiClass]]]):
    """Of one input, or of each."""


class TeiScores(RootModel[list[float]]):
    pass


class TeiInfo(Answer):
    model_id: str
    model_sha: None
    model_dtype: str | None
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str


# Ollama's


class OllamaEnd(Answer):
    """The last line has the reason and the figures."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaSaid(Answer):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class OllamaChatAnswer(OllamaEnd):
    message: OllamaSaid


class OllamaGenerateAnswer(OllamaEnd):
    response: str
    thinking: str | None = None


class OllamaEmbedAnswer(Answer):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingAnswer(Answer):
    embedding: list[float]


class OllamaDetails(Answer):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Answer):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str | None = None
    size_vram: int | None = None
    context_length: int | None = None


class OllamaModels(Answer):
    models: list[OllamaModel]


class OllamaShown(Answer):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(Answer):
    version: str
    sensorium: str


# The server's own


class StatusAnswer(Answer):
    status: Literal["alive", "ready"]


class LoadAnswer(Answer):
    server_load: int


class VersionAnswer(Answer):
    version: str


class AnyAnswer(RootModel[Any]):
    """That of the endpoint which the request's fields choose."""


# Errors


class ErrorDetails(Answer):
    message: str
    type: str
    param: str | None
    code: str


class Error(Answer):
    error: ErrorDetails


class AnthropicErrorDetails(Answer):
    type: str
    message: str


class AnthropicError(Answer):
    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str


class OllamaError(Answer):
    error: str


ERRORS: dict[str, type[BaseModel]] = {
    "OpenAIErrors": Error,
    "AnthropicErrors": AnthropicError,
    "OllamaErrors": OllamaError,
}
"""By the name of the `ErrorForm`."""


@dataclass(frozen=True, slots=True)
class Content:
    """A form of answer. `model` is the whole body's, or one event's or line's of a stream; None for text and bytes."""

    media_type: str
    model: type[BaseModel] | None = None


def _json(model: type[BaseModel]) -> tuple[Content, ...]:
    return (Content("application/json", model),)


def _events(model: type[BaseModel], event: type[BaseModel]) -> tuple[Content, ...]:
    return (*_json(model), Content("text/event-stream", event))


def _lines(model: type[BaseModel]) -> tuple[Content, ...]:
    return (*_json(model), Content("application/x-ndjson", model))


_TEXT = Content("text/plain")
_BYTES = Content("application/octet-stream")
_TRANSCRIPTION = (*_events(TranscriptionAnswer, TranscriptionEvent), _TEXT)
ANSWERS: dict[str, tuple[Content, ...]] = {
    "chat_completions": _events(ChatCompletionAnswer, ChatCompletionChunk),
    "responses": _events(ResponseAnswer, ResponseEvent),
    "input_tokens": _json(InputTokensAnswer),
    "chat_input_tokens": _json(InputTokensAnswer),
    "messages": _events(MessageAnswer, MessageEvent),
    "count_tokens": _json(CountAnswer),
    "completions": _events(TextCompletionAnswer, TextCompletionAnswer),
    "embeddings": (*_json(EmbeddingsAnswer), _BYTES),
    "pooling": (*_json(PoolingAnswer), _BYTES),
    "classify": _json(ClassifyAnswer),
    "score": _json(ScoreAnswer),
    "rerank": _json(RerankAnswer),
    "cohere_embed": _json(CohereEmbedAnswer),
    "embed": _json(TeiVectors),
    "embed_all": _json(TeiTokenVectors),
    "embed_sparse": _json(TeiWeights),
    "predict": _json(TeiClasses),
    "similarity": _json(TeiScores),
    "info": _json(TeiInfo),
    "transcriptions": _TRANSCRIPTION,
    "translations": _TRANSCRIPTION,
    "models": _json(ModelsAnswer),
    "model": _json(ModelRow),
    "load_model": _json(ModelRow),
    "unload_model": _json(ModelRow),
    "load_adapter": (_TEXT,),
    "unload_adapter": (_TEXT,),
    "tokenize": _json(TokenizeAnswer),
    "detokenize": _json(DetokenizeAnswer),
    "chat": _lines(OllamaChatAnswer),
    "generate": _lines(OllamaGenerateAnswer),
    "embed_texts": _json(OllamaEmbedAnswer),
    "embed_text": _json(OllamaEmbeddingAnswer),
    "tags": _json(OllamaModels),
    "ps": _json(OllamaModels),
    "show": _json(OllamaShown),
    "api_version": _json(OllamaVersion),
    "livez": _json(StatusAnswer),
    "readyz": _json(StatusAnswer),
    "health": (),
    "invocations": (*_events(AnyAnswer, AnyAnswer), _BYTES),
    "load": _json(LoadAnswer),
    "metrics": (_TEXT,),
    "version": _json(VersionAnswer),
    "docs": (Content("text/html"),),
    "openapi": _json(AnyAnswer),
}
"""By the endpoint's name: the forms that its 200 has. None at all: an empty body."""
