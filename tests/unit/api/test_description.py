"""/openapi.json tells the truth: every route is driven, and its answers are held to what the document says of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest
from support.api_support import TOOL_TEMPLATE, FakeEngine, Reply, Served, get, make_model, raw, request, serving, speak
from support.clips import sound, tone
from support.json_schema import problems
from support.pooling_engine import ALL, engine_of

from sensorium.api.docs_page import description
from sensorium.api.routes import ROUTES
from sensorium.api.transport.server import build_app
from sensorium.config import Limits, ServerConfig
from sensorium.processors.ultravox import UltravoxProcessor
from sensorium.serving.catalog import Catalog

Server = Callable[[], AbstractAsyncContextManager[Served]]
BOUNDARY = "x0123456789"
SAID = '<think>\nso\n</think>\n\nYes.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
USER = [{"role": "user", "content": "a"}]
TOOLS = [{"type": "function", "function": {"name": "now"}}]
RANKED: list[dict[str, Any]] = [
    {"query": "a", "documents": ["b", "c"]},
    {"query": "a", "documents": ["b"], "return_documents": False},
    {"query": "a", "texts": ["b", "c"], "return_text": True},
]
PAIR: dict[str, Any] = {"text_1": "a", "text_2": ["b", "c"]}
COHERE: dict[str, Any] = {"model": "tiny", "texts": ["a"], "input_type": "search_query"}
NOW = {"name": "now", "input_schema": {"type": "object"}}
TEXTS = {"input": ["a", "bc"]}
LABELS = {"id2label": {"0": "Default", "1": "Spoiled"}}
EARS = {"processor": UltravoxProcessor, "config": {"audio_config": {"num_mel_bins": 8, "max_source_positions": 50}}}
LOGPROBS = {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True}
ANTHROPIC = {"model": "tiny", "max_tokens": 90, "messages": USER}
OLLAMA_TEXT = {"model": "tiny", "prompt": "a"}
WHOLE = {"stream": False}
OLLAMA = {"model": "tiny", "messages": USER}

SERVERS: dict[str, Server] = {
    "chat": lambda: serving(FakeEngine(partial(speak, text=SAID)), model={"source": TOOL_TEMPLATE}),
    "plain": serving,
    "embedder": lambda: serving(engine_of(*ALL)),
    "classifier": lambda: serving(engine_of("classify", "token_classify"), model={"config": LABELS}),
    "sparse": lambda: serving(engine_of("embed", "sparse")),
    "reranker": lambda: serving(engine_of("classify", "score"), model={"config": {"num_labels": 1}}),
    "ears": lambda: serving(FakeEngine(), model=EARS),
}
# (server, path, bodies): each body once as it is; a GET has none. {model} is the model's name.
DRIVEN: list[tuple[str, str, Sequence[Mapping[str, Any] | None]]] = [
    (
        "chat",
        "/v1/chat/completions",
        [
            {"messages": USER},
            {"messages": USER, "tools": TOOLS, **LOGPROBS},
            {"messages": USER, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True},
            {"messages": USER, "tools": TOOLS, "stream": True, "logprobs": True},
        ],
    ),
    (
        "chat",
        "/v1/responses",
        [
            {"input": "a"},
            {"input": "a", "instructions": "b", "metadata": {"x": "y"}, "max_output_tokens": 3},
            {"input": "a", "stream": True, "tools": [{"type": "function", "name": "now"}]},
        ],
    ),
    ("chat", "/v1/responses/input_tokens", [{"input": "a"}]),
    ("chat", "/v1/chat/completions/input_tokens", [{"messages": USER}]),
    ("chat", "/v1/messages", [ANTHROPIC, {**ANTHROPIC, "stream": True}, {**ANTHROPIC, "tools": [NOW]}]),
    ("chat", "/v1/messages/count_tokens", [{"model": "tiny", "messages": USER}]),
    (
        "plain",
        "/v1/completions",
        [
            {"prompt": "a"},
            {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True},
            {"prompt": "a", "stream": True, "logprobs": 1, "stream_options": {"include_usage": True}},
        ],
    ),
    (
        "embedder",
        "/v1/embeddings",
        [TEXTS, {**TEXTS, "encoding_format": "base64"}, {**TEXTS, "encoding_format": "bytes"}],
    ),
    ("embedder", "/pooling", [TEXTS, {**TEXTS, "task": "token_embed"}, {**TEXTS, "encoding_format": "bytes_only"}]),
    ("classifier", "/classify", [TEXTS]),
    ("reranker", "/score", [PAIR]),
    ("reranker", "/v1/score", [PAIR]),
    ("reranker", "/rerank", RANKED),
    ("reranker", "/v1/rerank", RANKED),
    ("reranker", "/v2/rerank", RANKED),
    *(
        ("embedder", path, [COHERE, {**COHERE, "embedding_types": ["float", "int8", "base64"]}])
        for path in ("/v2/embed", "/v1/embed")
    ),
    ("embedder", "/embed", [{"inputs": "a"}, {"inputs": ["a", "b"]}]),
    ("sparse", "/embed_sparse", [{"inputs": ["a", "b"]}]),
    ("sparse", "/pooling", [{**TEXTS, "task": "sparse"}, {**TEXTS, "task": "embed&sparse"}]),
    ("embedder", "/embed_all", [{"inputs": ["a", "b"]}]),
    ("classifier", "/predict", [{"inputs": "a"}, {"inputs": [["a"], ["b"]]}]),
    ("reranker", "/similarity", [{"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}]),
    ("embedder", "/info", [None]),
    ("chat", "/v1/models", [None]),
    ("chat", "/v1/models/tiny", [None]),
    ("chat", "/v1/models/load", [{"model": "tiny"}]),
    ("chat", "/v1/load_lora_adapter", [{"lora_name": "extra", "lora_path": "/"}]),
    ("chat", "/v1/unload_lora_adapter", [{"lora_name": "extra"}]),
    ("plain", "/tokenize", [{"prompt": "a"}, {"messages": USER, "return_token_strs": True}]),
    ("plain", "/detokenize", [{"tokens": [1, 2]}]),
    (
        "chat",
        "/api/chat",
        [OLLAMA, {**OLLAMA, **WHOLE}, {"model": "tiny", "messages": []}, {**OLLAMA, "tools": TOOLS, **WHOLE}],
    ),
    ("chat", "/api/generate", [OLLAMA_TEXT, {**OLLAMA_TEXT, **WHOLE}, {"model": "tiny"}]),
    ("embedder", "/api/embed", [{"model": "tiny", "input": "a"}]),
    ("embedder", "/api/embeddings", [OLLAMA_TEXT]),
    *(("plain", path, [None]) for path in ("/api/tags", "/api/ps", "/api/version")),
    ("plain", "/api/show", [{"model": "tiny"}]),
    *(("plain", path, [None]) for path in ("/livez", "/readyz", "/health", "/load", "/metrics", "/version", "/docs")),
    ("plain", "/openapi.json", [None]),
    ("plain", "/invocations", [{"messages": USER}, {"prompt": "a", "stream": True}]),
]
AUDIO = ("/v1/audio/transcriptions", "/v1/audio/translations")
FORMS: list[dict[str, str]] = [{}, {"response_format": "text"}, {"response_format": "verbose_json"}, {"stream": "true"}]
BAD = ((b"{", "application/json"), (b'{"model": "none"}', "application/json"), (b"x", "text/x"))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Of a server with a key, so that 401 is described."""
    config, limits = ServerConfig(port=0, api_key=("k",)), Limits()
    app = build_app(Catalog.of({"tiny": make_model(FakeEngine(), config, limits)}), config, limits)
    return description(app.context)


def operation(document: dict[str, Any], path: str) -> dict[str, Any]:
    described = path if path in document["paths"] else "/v1/models/{model}"
    (found,) = document["paths"][described].values()
    return dict(found)


def bodies_of(reply: Reply, media_type: str) -> Iterator[Any]:
    """What of the answer is JSON: all of it, or each event or line."""
    text = reply.body.decode() if media_type.partition("/")[0] == "text" or "json" in media_type else ""
    if media_type == "application/json":
        yield json.loads(text)
    elif media_type == "application/x-ndjson":
        yield from map(json.loads, text.splitlines())
    elif media_type == "text/event-stream":
        data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        yield from (json.loads(one) for one in data if one != "[DONE]")


def check(document: dict[str, Any], path: str, reply: Reply) -> None:
    """The status, content type, headers and body are described."""
    described = operation(document, path)["responses"].get(str(reply.status))
    assert described is not None, (path, reply.status, reply.body[:300])
    for name in described["headers"]:
        assert name.lower() in reply.headers or "Ms" in name, (path, name)
    media_type = reply.headers.get("content-type", "").partition(";")[0]
    if "content" not in described:
        assert reply.body == b""
        return
    assert media_type in described["content"], (path, media_type)
    schema, schemas = described["content"][media_type]["schema"], document["components"]["schemas"]
    found = [one for body in bodies_of(reply, media_type) for one in problems(body, schema, schemas)]
    assert not found, (path, found[:5])
    assert media_type not in ("application/json", "text/event-stream") or list(bodies_of(reply, media_type))


async def ask(served: Served, path: str, body: Mapping[str, Any] | None, **headers: str) -> Reply:
    if body is None:
        return await get(served.port, path, headers=headers)
    return await raw(
        served.port,
        request("POST", path, json.dumps(body).encode(), headers={"Content-Type": "application/json", **headers}),
    )


@pytest.mark.parametrize("server", [name for name in SERVERS if name != "ears"])
async def test_answers_are_as_described(document: dict[str, Any], server: str) -> None:
    async with SERVERS[server]() as served:
        for _, path, bodies in (row for row in DRIVEN if row[0] == server):
            for body in bodies:
                reply = await ask(served, path, body)
                assert reply.status == 200, (path, body, reply.body)
                check(document, path, reply)


async def test_transcriptions_are_as_described(document: dict[str, Any]) -> None:
    clip = sound(tone(0.3, 16_000)[None], 16_000)
    async with SERVERS["ears"]() as served:
        for path in AUDIO:
            for fields in FORMS:
                parts = b"".join(_part(name, value.encode()) for name, value in fields.items())
                body = parts + _part("file", clip, '; filename="a.wav"') + f"--{BOUNDARY}--\r\n".encode()
                headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
                reply = await raw(served.port, request("POST", path, body, headers=headers))
                assert reply.status == 200, reply.body
                check(document, path, reply)


def _part(name: str, value: bytes, more: str = "") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def test_every_route_is_driven() -> None:
    driven = {path for _, path, _ in DRIVEN} | set(AUDIO)
    documented = {route.path.replace("{model}", "tiny") for route in ROUTES if route.documented}
    assert driven | {"/v1/models/unload"} == documented  # which these models are not; see test_catalog_loading


def test_names_of_schemas_are_plain(document: dict[str, Any]) -> None:
    assert not [name for name in document["components"]["schemas"] if "__" in name]


@pytest.fixture
async def closed() -> AsyncIterator[Served]:
    async with serving(api_key=("k",), operator_key=("k",)) as served:
        yield served


async def test_errors_are_as_described(document: dict[str, Any], closed: Served) -> None:
    key = {"Authorization": "Bearer k"}
    posts = [route.path for route in ROUTES if route.documented and route.method == "POST"]
    for path in posts:
        nobody = await ask(closed, path, {})
        assert (nobody.status, nobody.headers["www-authenticate"]) == (401, "Bearer")
        check(document, path, nobody)
        for body, content_type in (
            (b"{", "application/json"),
            (b'{"model": "none"}', "application/json"),
            (b"x", "text/x"),
        ):
            reply = await raw(closed.port, request("POST", path, body, headers={"Content-Type": content_type, **key}))
            assert reply.status in (400, 404, 415), (path, reply.status, reply.body)
            check(document, path, reply)
    check(document, "/v1/models/none", await get(closed.port, "/v1/models/none", headers=key))
    closed.engine.state, closed.engine.ready = "loading", None
    for route in (route for route in ROUTES if route.documented):
        path = route.path.replace("{model}", "tiny")
        reply = await ask(closed, path, {} if route.method == "POST" else None, **key)
        is_described = "503" in operation(document, path)["responses"]
        assert (reply.status == 503) == (is_described and not route.is_operators), path
        check(document, path, reply)
