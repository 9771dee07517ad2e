"""Paths of other servers: SageMaker's and vLLM's, and what a wrong base URL is told."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.api_support import FakeEngine, Reply, get, post, serving, until
from support.pooling_engine import ALL, engine_of

from sensorium.api.routes import NOT_OFFERED, ROUTES
from sensorium.types import EngineOutput, EngineRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/api/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("/V1/Chat/Completions", "/v1/chat/completions"),
        ("/v1/v1/embeddings", "/v1/embeddings"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/pooling", "/pooling"),
        ("/v1/v1/rerank", "/rerank"),
        ("/v1/v1/messages", "/v1/messages"),
    ],
)
async def test_a_wrong_base_url_is_told_the_right_one(port: int, path: str, meant: str) -> None:
    reply = await post(port, path, CHAT)
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert f" {meant} is the path" in reply.error["message"]
    assert "GET /docs" not in reply.error["message"]
    base = "/v1." if meant.startswith("/v1") and meant != "/v1/messages" else "PORT."
    assert reply.error["message"].endswith(base)


async def test_lists_of_models_too_and_nothing_else(port: int) -> None:
    assert "/v1/models is" in (await get(port, "/openai/models")).error["message"]
    assert "/v1/models/{model} is" in (await get(port, "/v1/v1/models/tiny")).error["message"]
    for path in ("/nothing", "/v1/nothing", "/chats", "/" + "a/" * 3000 + "completions"):
        assert (await get(port, path)).error["message"].endswith("GET /docs lists what there is.")


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("/v2/chat", "/v1/chat/completions"),  # Cohere's
        ("/v1/chat", "/v1/chat/completions"),
        ("/v1beta/models/gemini-pro:generateContent", "/v1/chat/completions"),
        ("/v1beta/models/gemini-pro:streamGenerateContent", "/v1/chat/completions"),
        ("/v1", "/chat/completions"),
        ("/v2", "/chat/completions"),
        ("/v1/complete", "/v1/messages"),
        ("/generate", "/v1/completions"),
        ("/generate_stream", "/v1/completions"),
        ("/completion", "/v1/completions"),
        ("/v1/files", "run-batch"),
        ("/v1/batches", "run-batch"),
        ("/v1/audio/speech", "answers here are text"),
        ("/v1/images/generations", "answers here are text"),
    ],
)
async def test_paths_of_apis_that_are_not_offered_are_told_what_there_is_instead(
    port: int, path: str, instead: str
) -> None:
    for reply in (await get(port, path), await post(port, path, CHAT)):
        assert reply.status == 404 and instead in reply.error["message"]


def test_what_is_told_is_offered() -> None:
    """And what is said not to be offered is not."""
    paths = {route.path for route in ROUTES}
    for end, advice in NOT_OFFERED.items():
        assert not {f"/{end}", f"/v1/{end}", f"/v2/{end}"} & paths
        assert set(re.findall(r"/(?:v1|api)/[a-z/]+", advice)) <= paths


@pytest.mark.parametrize(
    "path", ["/v1/responses/resp_12", "/v1/responses/resp_12/input_items", "/v1/chat/completions/chatcmpl-12"]
)
async def test_who_asks_for_an_earlier_answer_is_told_that_none_is_kept(port: int, path: str) -> None:
    for reply in (await get(port, path), await post(port, path, {})):
        assert reply.status == 404
        assert reply.error["message"].startswith("Answers are not kept on this server: send ")


async def test_openais_routes_without_their_version(port: int) -> None:
    assert (await post(port, "/chat/completions", CHAT)).json["object"] == "chat.completion"
    assert (await post(port, "/completions", {"prompt": "a"})).json["object"] == "text_completion"
    async with serving(engine_of(*ALL)) as served:
        assert (await post(served.port, "/embeddings", {"input": "a"})).json["object"] == "list"
    assert (await get(port, "/models")).json["data"][0]["id"] == "tiny"
    assert (await get(port, "/models/tiny")).json["id"] == "tiny"
    assert (await post(port, "/audio/transcriptions", {})).error["code"] != "not_found"


async def test_ping_is_health() -> None:
    engine = FakeEngine()
    async with serving(engine, api_key=("k",)) as served:
        for state, status in (("ready", 200), ("restarting", 503)):
            engine.state = state
            assert (await get(served.port, "/ping")).status == status
            reply = await post(served.port, "/ping", b"")
            assert reply.status == status
            assert state != "ready" or reply.body == b""
        foreign = await post(served.port, "/ping", b"", headers={"Origin": "http://evil"})
        assert foreign.status == 403


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (CHAT, "chat.completion"),
        ({**CHAT, "model": "tiny"}, "chat.completion"),
        ({"prompt": "hi"}, "text_completion"),
        ({"prompt": [1, 2], "messages": None}, "text_completion"),
        ({"input": "hi"}, "list"),
        ({"tokens": [72]}, "i"),
        ({"query": "a", "documents": ["b", "c"]}, "rerank"),
        ({"text_1": "a", "text_2": "b"}, "list"),
        ({"queries": "a", "documents": ["b"]}, "list"),
    ],
)
async def test_invocations_are_told_by_their_fields(body: dict[str, Any], kind: str) -> None:
    engine = engine_of(*ALL) if kind in ("list", "rerank") else FakeEngine()
    async with serving(engine) as served:
        reply = await post(served.port, "/invocations", body)
        assert reply.status == 200, reply.body
        found = reply.json
        assert kind == (found.get("object") or ("rerank" if "results" in found else found["prompt"]))


async def test_invocations_have_the_same_guards() -> None:
    async with serving(FakeEngine(), api_key=("k",)) as served:

        async def invoke(body: Any, **headers: str) -> Reply:
            return await post(served.port, "/invocations", body, headers={"Authorization": "Bearer k", **headers})

        assert (await post(served.port, "/invocations", CHAT)).status == 401
        assert (await invoke(CHAT, Origin="http://evil")).status == 403
        assert (await invoke(CHAT)).status == 200
        stream = await invoke({**CHAT, "stream": True})
        assert stream.body.endswith(b"data: [DONE]\n\n")
        assert (await invoke({**CHAT, "model": "other"})).error["code"] == "model_not_found"
        assert (await invoke({"input": "a", "model": 5})).error["param"] == "model"
        for body in (b"", b"[]", b"{", b"\xff", b"[" * 1000):
            assert (await invoke(body)).status == 400
        assert (await invoke({"text": "a"})).error["code"] == "missing_required_parameter"
        assert (await invoke(b'{"input":[%b]}' % b",".join([b"[]"] * 70_000))).error["code"] == "too_many_values"
        large = await invoke({**CHAT, "metadata": "x" * 10**6})
        assert large.status == 200
        form = await invoke(b"--x\r\n", **{"Content-Type": "multipart/form-data; boundary=x"})
        assert form.error["code"] == "invalid_multipart"
        assert served.http._app.context.pending.total == 0


async def test_load_counts_requests_in_progress() -> None:
    async def waiting(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        await asyncio.sleep(60)
        yield EngineOutput(request.id)

    async with serving(FakeEngine(script=waiting)) as served:
        assert (await get(served.port, "/load")).json == {"server_load": 0}
        tasks = [asyncio.create_task(post(served.port, "/v1/chat/completions", CHAT)) for _ in range(3)]
        await until(lambda: len(served.engine.active) == 3)
        assert (await get(served.port, "/load")).json == {"server_load": 3}
        for task in tasks:
            task.cancel()


async def test_the_tokenizer_is_shown_where_the_operator_says_so() -> None:
    async with serving() as served:
        reply = await get(served.port, "/tokenizer_info")
        assert (reply.status, "--enable-tokenizer-info-endpoint" in reply.error["message"]) == (404, True)
    async with serving(enable_tokenizer_info_endpoint=True, api_key=("k",)) as served:
        assert (await get(served.port, "/tokenizer_info")).status == 401
        reply = await get(served.port, "/tokenizer_info", headers={"Authorization": "Bearer k"})
        assert "message.role" in reply.json["chat_template"]


def test_every_documented_operation_has_its_own_name() -> None:
    from sensorium.api.docs_page import _operation_id

    names = [(_operation_id(route), route.method) for route in ROUTES if route.documented]
    assert len(set(names)) == len(names), json.dumps(names)
