"""The table of routes, and the way from a path to one of them. A new endpoint is a row here and a function.

Routing is by exact path: no patterns, no redirects, no trailing slashes, so that what auth saw is what is called.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel

from sensorium.api import adapters, catalog, ollama, ollama_models, playground, status, tei
from sensorium.api.chat import chat_completions, chat_input_tokens
from sensorium.api.cohere import cohere_embed
from sensorium.api.completions import completions
from sensorium.api.context import Context
from sensorium.api.docs_page import docs, openapi
from sensorium.api.embeddings import embeddings
from sensorium.api.error_forms import BLOBS, error_form
from sensorium.api.invocations import invocations
from sensorium.api.messages import count_tokens, messages
from sensorium.api.pooling import classify, pooling
from sensorium.api.protocol.audio import AudioRequest
from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.cohere import CohereEmbedRequest
from sensorium.api.protocol.completion import CompletionRequest
from sensorium.api.protocol.messages import CountTokensRequest, MessagesRequest
from sensorium.api.protocol.models import LoadAdapter, NamedModel, UnloadAdapter
from sensorium.api.protocol.ollama import (
    GenerateRequest,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    ShowRequest,
)
from sensorium.api.protocol.pooling import ClassifyRequest, EmbeddingsRequest, PoolingRequest
from sensorium.api.protocol.responses import ResponsesRequest
from sensorium.api.protocol.score import RerankRequest, ScoreRequest
from sensorium.api.protocol.tei import EmbedRequest, PredictRequest, SimilarityRequest
from sensorium.api.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from sensorium.api.recordings import FILE
from sensorium.api.responses import input_tokens, not_kept, responses
from sensorium.api.score import rerank, score
from sensorium.api.tokens import detokenize, tokenize
from sensorium.api.transcriptions import transcriptions, translations
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.errors import MethodNotAllowedError
from sensorium.errors import NotFoundError

Endpoint = Callable[[Context, Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """`body` is the request model of a POST route. `needs_engine`: answered with 503 until the model is there.

    `documented`: part of the API, and so of its description. `is_operators`: it changes what is served.
    """

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    body: type[BaseModel] | None = None
    file: str | None = None  # the body is a form with a file of this name, not JSON
    needs_engine: bool = True
    documented: bool = True
    is_operators: bool = False


ANSWERS = ("/v1/responses/resp_", "/v1/chat/completions/chatcmpl-")
"""What the path of an earlier answer begins with, and what is below it."""

ROUTES: tuple[Route, ...] = (
    Route("POST", "/v1/chat/completions", chat_completions, "Answer a chat of text and media.", ChatRequest),
    Route("POST", "/v1/responses", responses, "Answer a chat as a list of items, stateless.", ResponsesRequest),
    Route("POST", "/v1/responses/input_tokens", input_tokens, "Tokens of such a request.", ResponsesRequest),
    Route("POST", "/v1/chat/completions/input_tokens", chat_input_tokens, "Tokens of a chat.", ChatRequest),
    *(
        Route(method, f"{start}{{id}}", not_kept, "Not kept.", needs_engine=False, documented=False)
        for start in ANSWERS
        for method in ("GET", "POST", "DELETE")
    ),
    Route("POST", "/v1/messages", messages, "Answer a chat, as Anthropic's API has it.", MessagesRequest),
    Route("POST", "/v1/messages/count_tokens", count_tokens, "The tokens of such a chat.", CountTokensRequest),
    Route("POST", "/v1/completions", completions, "Continue a text.", CompletionRequest),
    Route("POST", "/v1/embeddings", embeddings, "Texts, chats or media as vectors.", EmbeddingsRequest),
    Route("POST", "/pooling", pooling, "What the model makes of a prompt: a vector, or one per token.", PoolingRequest),
    Route("POST", "/classify", classify, "The class of each text.", ClassifyRequest),
    *(
        Route("POST", path, score, "How well pairs of texts go together.", ScoreRequest)
        for path in ("/score", "/v1/score")
    ),
    *(
        Route("POST", path, rerank, "Documents in the order of their relevance to a query.", RerankRequest)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
    *(
        Route("POST", path, cohere_embed, "Texts and images as vectors, in Cohere's form.", CohereEmbedRequest)
        for path in ("/v2/embed", "/v1/embed")
    ),
    Route("POST", "/embed", tei.embed, "Texts as vectors, as text-embeddings-inference has it.", EmbedRequest),
    Route("POST", "/embed_all", tei.embed_all, "A vector for every token, the same way.", EmbedRequest),
    Route("POST", "/embed_sparse", tei.embed_sparse, "Tokens with weights, the same way.", EmbedRequest),
    Route("POST", "/predict", tei.predict, "The classes of texts or pairs of texts, the same way.", PredictRequest),
    Route("POST", "/similarity", tei.similarity, "How alike sentences are, the same way.", SimilarityRequest),
    Route("GET", "/info", tei.info, "The model and its limits, the same way."),
    Route("POST", "/v1/audio/transcriptions", transcriptions, "What is said in a recording.", AudioRequest, file=FILE),
    Route("POST", "/v1/audio/translations", translations, "The same in another language.", AudioRequest, file=FILE),
    Route("GET", "/v1/models", catalog.models, "What is served, under which names."),
    Route("GET", "/v1/models/{model}", catalog.model, "One model."),
    *(
        Route("POST", f"/v1/models/{word}", endpoint, summary, NamedModel, needs_engine=False, is_operators=True)
        for word, endpoint, summary in (
            ("load", catalog.load_model, "Load a model. For an operator's key."),
            ("unload", catalog.unload_model, "Give a model's memory back. For an operator's key."),
        )
    ),
    *(
        Route("POST", f"/v1/{word}_lora_adapter", endpoint, summary, body, needs_engine=False, is_operators=True)
        for word, endpoint, summary, body in (
            ("load", adapters.load_adapter, "Load a LoRA adapter. For an operator's key.", LoadAdapter),
            ("unload", adapters.unload_adapter, "Forget a LoRA adapter. For an operator's key.", UnloadAdapter),
        )
    ),
    Route("POST", "/tokenize", tokenize, "The token ids of a text or a chat.", TokenizeRequest),
    Route("POST", "/detokenize", detokenize, "The text of token ids.", DetokenizeRequest),
    Route("POST", "/api/chat", ollama.chat, "Answer a chat, as Ollama has it.", OllamaChatRequest),
    Route("POST", "/api/generate", ollama.generate, "Answer a prompt, as Ollama has it.", GenerateRequest),
    Route("POST", "/api/embed", ollama.embed_texts, "Texts as vectors, as Ollama has it.", OllamaEmbedRequest),
    Route("POST", "/api/embeddings", ollama.embed_text, "The same, older.", OllamaEmbeddingsRequest),
    Route("GET", "/api/tags", ollama_models.tags, "What is served, as Ollama lists it."),
    Route("GET", "/api/ps", ollama_models.ps, "What is loaded: the same."),
    Route("POST", "/api/show", ollama_models.show, "One model, as Ollama describes it.", ShowRequest),
    Route("GET", "/api/version", ollama_models.api_version, "The version of Ollama's API.", needs_engine=False),
    *(
        Route(method, path, ollama_models.not_offered, "Not offered.", needs_engine=False, documented=False)
        for method, path in (
            *(("POST", f"/api/{name}") for name in ("create", "pull", "push", "copy")),
            ("DELETE", "/api/delete"),
            *((method, f"{BLOBS}{{digest}}") for method in ("POST", "GET")),
        )
    ),
    Route("GET", "/livez", status.livez, "Does the process answer?", needs_engine=False),
    Route("GET", "/readyz", status.readyz, "Are requests answered?", needs_engine=False),
    Route("GET", "/health", status.health, "Are requests answered? Without a body.", needs_engine=False),
    *(
        Route(method, "/ping", status.health, "The same, as SageMaker asks.", needs_engine=False, documented=False)
        for method in ("GET", "POST")
    ),
    Route("POST", "/invocations", invocations, "Any of the other requests, told by its fields, as SageMaker sends it."),
    Route("POST", "/", invocations, "The same, as clients of text-embeddings-inference send it.", documented=False),
    Route("GET", "/load", status.load, "How many requests are being worked on.", needs_engine=False),
    Route(
        "GET",
        "/tokenizer_info",
        status.tokenizer_info,
        "The tokenizer's settings, if the operator opened it.",
        documented=False,
    ),
    Route("GET", "/metrics", status.metrics, "Counters and gauges for Prometheus.", needs_engine=False),
    Route("GET", "/version", status.version, "The server's version.", needs_engine=False),
    Route("GET", "/docs", docs, "This description as a page.", needs_engine=False),
    Route("GET", "/openapi.json", openapi, "This description as OpenAPI 3.1.", needs_engine=False),
    *(
        Route("GET", path, playground.page, "The web page.", needs_engine=False, documented=False)
        for path in playground.PAGES
    ),
)
_MODEL_PATH = "/v1/models/{model}"
_PATTERNS = {"/v1/models/": _MODEL_PATH, BLOBS: f"{BLOBS}{{digest}}", **{start: f"{start}{{id}}" for start in ANSWERS}}
_MAX_ADVISED_CHARS = 256
_CHATS = (
    "chats are answered at /v1/chat/completions (OpenAI's API), /v1/messages (Anthropic's) and /api/chat (Ollama's)."
)
_TEXTS = "prompts are continued at /v1/completions (OpenAI's API) and /api/generate (Ollama's)."
_FILES = "`sensorium run-batch` answers a file of requests, without a server."
_TEXT_ONLY = "answers here are text, vectors, classes and scores."
NOT_OFFERED = {
    **dict.fromkeys(
        ("v1", "v2"), "it is a base URL, to which clients of OpenAI's API add /chat/completions and others."
    ),
    "chat": f"Cohere's chat is not offered: {_CHATS}",
    "generatecontent": f"Gemini's API is not offered: {_CHATS}",
    "streamgeneratecontent": f"Gemini's API is not offered: {_CHATS}",
    "complete": f"this is not offered: {_CHATS}",
    **dict.fromkeys(("generate", "generate_stream", "completion"), _TEXTS),
    **dict.fromkeys(("files", "batches"), _FILES),
    **dict.fromkeys(
        ("audio/speech", "images/generations", "images/edits", "images/variations", "videos", "moderations"), _TEXT_ONLY
    ),
}
"""Ends of paths that other APIs have and we have not, to what there is instead. They are below a version or below
nothing; Gemini's stand behind a model's name and a colon."""


class Router:
    """Exact paths to routes; everything is also there below /api/v1."""

    def __init__(self, routes: tuple[Route, ...] = ROUTES) -> None:
        self._paths: dict[str, dict[str, Route]] = {}
        for route in routes:
            self._paths.setdefault(route.path, {})[route.method] = route
        self._by_tail: dict[str, str] = {}  # the path below its version, in small letters -> the path
        for route in (route for route in routes if route.documented):
            self._by_tail.setdefault(_tail(route.path), route.path)

    def find(self, call: Call) -> Route:
        """The route of a call; also brings `call.path` into its canonical form."""
        path = canonical(call.path)
        methods = self._paths.get(path)
        for start, pattern in _PATTERNS.items():
            if methods is None and path.startswith(start) and path != start:
                methods = self._paths.get(pattern)
        if methods is None:
            raise NotFoundError(f"There is nothing at this path; {self._advice(path)}")
        route = methods.get("GET" if call.method == "HEAD" else call.method)
        if route is None:
            raise MethodNotAllowedError("This method is not for this path.", allow=", ".join(sorted(methods)))
        call.path = path
        return route

    def _advice(self, path: str) -> str:
        """Where the path was meant to lead, if it ends like one of ours below another base URL, or in another case."""
        parts = [part for part in path[:_MAX_ADVISED_CHARS].lower().split("/") if part]
        known = NOT_OFFERED.get(_tail("/" + "/".join(parts))) or NOT_OFFERED.get(path.lower().rpartition(":")[2])
        if known is not None:
            return known
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            meant = self._by_tail.get(tail)
            if meant is None and tail.startswith("models/"):
                meant = _MODEL_PATH
            if meant is not None:
                is_openai = meant.startswith("/v1/") and error_form(meant) is None
                base = "http://HOST:PORT/v1" if is_openai else "http://HOST:PORT"
                return f"{meant} is the path of this endpoint, so the base URL must end as in {base}."
        return "GET /docs lists what there is."


def _tail(path: str) -> str:
    """/v1/chat/completions -> chat/completions"""
    return re.sub("^/(v[0-9]+/)?", "", path)


def canonical(path: str) -> str:
    """The path in the table: /chat/completions -> /v1/chat/completions, as of a base URL without its /v1, and
    /api/v1/models -> /v1/models or /api/v1/tokenize -> /tokenize, as of one with /api in front."""
    if path in _PATHS:
        return path
    below = path.removeprefix("/api/v1") if path.startswith("/api/v1/") else path
    versioned = "/v1" + below
    is_known = versioned in _PATHS or below.startswith("/models/")
    return versioned if is_known or (below is not path and below not in _PATHS) else below


_PATHS = frozenset(route.path for route in ROUTES if route.documented)
