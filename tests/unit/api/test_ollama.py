"""Ollama's routes: lines of a stream, whole answers, what the model is asked, what is listed, and errors."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.api_support import ANSWER, CONTEXT, LEAKS, Reply, Served, get, post, raw, request, serving
from support.marked_format import MarkedFormat
from support.pictures import encoded, photo
from support.pooling_engine import ALL, SIZE, engine_of
from support.scripted import marked_format, prompt_of, says, speaking

from sensorium.api.ollama_answers import Pieces
from sensorium.config import Limits
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text

__all__ = ["marked_format"]

PIXELS = base64.b64encode(encoded(photo(32, 16))).decode()  # 8 rows
HI: list[Any] = [{"role": "user", "content": "hi"}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


async def ask(served: Served, path: str = "/api/chat", **fields: Any) -> Reply:
    own = {"messages": HI} if path == "/api/chat" else {"prompt": "hi"} if path == "/api/generate" else {}
    body = {"model": "tiny", **own, **fields}
    return await post(served.port, path, {name: value for name, value in body.items() if value is not ...})


def lines_of(reply: Reply) -> list[dict[str, Any]]:
    assert reply.headers["content-type"] == "application/x-ndjson"
    found = [json.loads(line) for line in reply.body.decode().splitlines()]
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    return found


def error_of(reply: Reply) -> str:
    """The message, with the form checked."""
    assert set(reply.json) == {"error"}
    assert not LEAKS.search(reply.body.decode())
    return str(reply.json["error"])


async def test_chats_are_streamed_by_default(marked_format: MarkedFormat) -> None:
    said: list[Delta] = [Reasoning("Hm."), Text("I look. "), Call(0, "get_weather"), Arguments(0, '{"city": "Zürich"}')]
    async with speaking(said, [Call(1, "get_weather"), Arguments(1, "{}"), Text("so")]) as served:
        lines = lines_of(await ask(served, tools=[WEATHER]))
        whole = (await ask(served, tools=[WEATHER], stream=False)).json
        prompt = served.engine.requests[0].prompt
    messages = [line["message"] for line in lines]
    assert {message["role"] for message in messages} == {"assistant"}
    assert "".join(message["content"] for message in messages) == whole["message"]["content"] == "I look. so"
    assert "".join(message.get("thinking", "") for message in messages) == whole["message"]["thinking"] == "Hm."
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    for found in (calls, whole["message"]["tool_calls"]):
        assert [call["function"] for call in found] == [
            {"index": 0, "name": "get_weather", "arguments": {"city": "Zürich"}},
            {"index": 1, "name": "get_weather", "arguments": {}},
        ]
        assert found[0]["id"].startswith("call_") and found[0]["id"] != found[1]["id"]
    for end in (lines[-1], whole):
        assert (end["model"], end["done"], end["done_reason"]) == ("tiny", True, "stop")
        assert (end["prompt_eval_count"], end["eval_count"] > 40) == (len(prompt.token_ids), True)
        for name in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
            assert isinstance(end[name], int) and end[name] >= 0
        assert end["created_at"].endswith("Z")


async def test_texts_with_and_without_a_template(marked_format: MarkedFormat) -> None:
    async with speaking([Reasoning("Hm."), Text("ok")]) as served:
        lines = lines_of(await ask(served, "/api/generate", system="S"))
        assert "".join(line["response"] for line in lines) == "ok"
        assert "".join(line.get("thinking", "") for line in lines) == "Hm."
        assert lines[-1]["done_reason"] == "stop"
        raw_answer = (await ask(served, "/api/generate", prompt="<|start|>x", raw=True, stream=False)).json
        assert raw_answer["response"] == "\x01Hm.\x02ok"
        prompts = [prompt_of(asked) for asked in served.engine.requests]
    assert prompts == ["<|start|>system\nS<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n", "<|start|>x"]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_images_come_before_the_text(path: str) -> None:
    fields = {"messages": [{**HI[0], "images": [PIXELS]}]} if path == "/api/chat" else {"images": [PIXELS]}
    async with speaking("ok", sees=True) as served:
        reply = await ask(served, path, stream=False, **fields)
        assert reply.status == 200, reply.body
        asked = served.engine.requests[0]
    assert [span.length for span in asked.prompt.spans] == [8]
    assert prompt_of(asked).endswith("<|stop|>\nhi<|end|>\n<|start|>assistant\n")


ASKED: list[Any] = [
    (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "1", "tool_name": "get_weather"},
            {"role": "tool", "content": "2"},
        ],
        "user\na|assistant\n|tool\n1|tool\n2|assistant\n",
    ),
    (
        [{"role": "system", "content": "S"}, *HI, {"role": "user", "content": "ho"}],
        "system\nS|user\nhi\nho|assistant\n",
    ),
    ([*HI, {"role": "assistant", "content": "The answer is"}], "user\nhi|assistant\nThe answer is"),
    ([*HI, {"role": "assistant", "thinking": "t", "content": "b"}, *HI], "user\nhi|assistant\nb|user\nhi|assistant\n"),
    ([{"role": "user", "content": "<|end|>"}], "user\n<|end|>|assistant\n"),
]


async def test_what_the_model_is_asked(marked_format: MarkedFormat) -> None:
    async with speaking("ok") as served:
        for messages, prompt in ASKED:
            reply = await ask(served, messages=messages, tools=[WEATHER])
            assert reply.status == 200, reply.body
            text = prompt_of(served.engine.requests[-1])
            assert text.replace("<|start|>", "").replace("<|end|>\n", "|") == prompt


async def test_results_are_of_the_calls_that_they_name(marked_format: MarkedFormat) -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}({{ c.id }}){% endfor %}"
        "{% if m.role == 'tool' %}[{{ m.tool_call_id }} {{ m.name }}]{% endif %}{% endfor %}."
    )
    other = {"id": "own", "function": {"name": "other", "arguments": {}}}
    history = [
        {"role": "assistant", "content": "", "tool_calls": [CALL, other]},
        {"role": "tool", "content": "1", "tool_name": "other"},
        {"role": "tool", "content": "2", "tool_name": "get_weather"},
    ]
    async with speaking("ok", template=template) as served:
        assert (await ask(served, messages=history, tools=[WEATHER])).status == 200
        text = prompt_of(served.engine.requests[0])
    assert text == "(call_0_0)(own)[own other][call_0_0 get_weather]."


async def test_options() -> None:
    options = {
        "num_predict": 7,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.25,
        "min_p": 0.1,
        "seed": 3,
        "repeat_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repeat_last_n": -1,
        "num_ctx": 4096,
        "num_gpu": 99,
        "mirostat": 0,
        "typical_p": 1.0,
        "own": 5,
    }
    async with serving() as served:
        reply = (await ask(served, stream=False, options=options, keep_alive="5m")).json
        sampling = served.engine.requests[0].sampling
        assert sampling is not None
        assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (7, 0.5, 5, 0.25)
        assert (sampling.min_p, sampling.seed, sampling.repetition_penalty) == (0.1, 3, 1.5)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        assert reply["done_reason"] == "length"
        stopped = (await ask(served, stream=False, options={"stop": ["wor"], "num_predict": -1})).json
        assert (stopped["message"]["content"], stopped["done_reason"]) == (ANSWER.partition("wor")[0], "stop")
        await ask(served, options={"num_predict": 10**6})
        asked = served.engine.requests[-1]
        assert asked.sampling is not None
        assert asked.sampling.max_tokens == CONTEXT - len(asked.prompt.token_ids)


async def test_an_answer_has_what_the_checkpoint_says_or_all_that_fits() -> None:
    async with serving(generation={"max_new_tokens": 9}) as served:
        for options, most in (({}, 9), ({"num_predict": -1}, None), ({"num_predict": -2}, None)):
            await ask(served, options=options)
            asked = served.engine.requests[-1]
            assert asked.sampling is not None
            assert asked.sampling.max_tokens == (most or CONTEXT - len(asked.prompt.token_ids))


async def test_log_probabilities(served: Served) -> None:
    """As /v1/chat/completions has them, and streamed the same."""
    [expected] = (
        await post(served.port, "/v1/chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 2})
    ).json["choices"]
    for path in ("/api/chat", "/api/generate"):
        whole = (await ask(served, path, logprobs=True, top_logprobs=2, stream=False)).json
        assert whole["logprobs"] == expected["logprobs"]["content"]
        lines = lines_of(await ask(served, path, logprobs=True, top_logprobs=2))
        assert [one for line in lines for one in line.get("logprobs", ())] == whole["logprobs"]
    plain = (await ask(served, logprobs=True, stream=False)).json["logprobs"]
    assert all(one["top_logprobs"] == [] for one in plain)


@pytest.mark.parametrize(("think", "wanted"), [(None, ""), (True, "True"), (False, "False"), ("high", "Truehigh")])
async def test_thinking(think: Any, wanted: str) -> None:
    template = "{{ messages[0].content }}{{ enable_thinking }}{{ reasoning_effort }}"
    async with speaking("ok", template=template) as served:
        assert (await ask(served, think=think)).status == 200
        assert prompt_of(served.engine.requests[0]) == f"hi{wanted}"


async def test_nothing_to_say_loads_the_model() -> None:
    async with serving() as served:
        for path, fields, reason in (
            ("/api/chat", {"messages": []}, "load"),
            ("/api/chat", {"messages": ...}, "load"),
            ("/api/chat", {"messages": [], "keep_alive": 0}, "unload"),
            ("/api/generate", {"prompt": ...}, "load"),
            ("/api/generate", {"prompt": "", "keep_alive": "0"}, "unload"),
        ):
            found = (await ask(served, path, **fields)).json
            assert (found["done"], found["done_reason"]) == (True, reason)
            assert found.get("response", found.get("message", {}).get("content")) == ""
        assert (await ask(served, messages=[], model="x")).status == 404
        assert served.engine.requests == []
        assert served.http._app.context.pending.total == 0


async def test_vectors() -> None:
    async with serving(engine_of(*ALL)) as served:
        found = (await post(served.port, "/api/embed", {"model": "tiny", "input": ["a", "bc"]})).json
        assert [len(vector) for vector in found["embeddings"]] == [SIZE, SIZE]
        assert (found["model"], found["prompt_eval_count"], found["load_duration"]) == ("tiny", 3, 0)
        one = (await post(served.port, "/api/embed", {"model": "tiny:latest", "input": "a"})).json
        assert one["embeddings"] == found["embeddings"][:1]
        old = (await post(served.port, "/api/embeddings", {"model": "tiny", "prompt": "a"})).json
        assert old == {"embedding": one["embeddings"][0]}
        long = {"model": "tiny", "input": "x" * 2 * CONTEXT}
        assert (await post(served.port, "/api/embed", long)).status == 200
        refused = await post(served.port, "/api/embed", {**long, "truncate": False})
        assert refused.status == 400
        for body, named in (
            ({"model": "tiny"}, "input"),
            ({"model": "tiny", "input": ""}, "input"),
            ({"model": "tiny", "input": "a", "dimensions": 3}, "dimensions"),
            ({"model": "tiny", "input": 5}, "input"),
        ):
            reply = await post(served.port, "/api/embed", body)
            assert (reply.status, named in error_of(reply)) == (400, True)
        for old in ({"model": "tiny"}, {"model": "tiny", "prompt": ["a"]}):
            reply = await post(served.port, "/api/embeddings", old)
            assert (reply.status, "prompt" in error_of(reply)) == (400, True)


async def test_what_is_served(marked_format: MarkedFormat) -> None:
    config = {"model_type": "tinyllama"}
    async with speaking("ok", names=("tiny", "org/other:8b")) as served:
        rows = (await get(served.port, "/api/tags")).json["models"]
        assert [row["name"] for row in rows] == [row["model"] for row in rows] == ["tiny:latest", "org/other:8b"]
        details = rows[0]["details"]
        assert (details["family"], details["quantization_level"]) == ("LlamaForCausalLM", "F32")
        assert len(rows[0]["digest"]) == 64
        loaded = (await get(served.port, "/api/ps")).json["models"]
        assert [row["context_length"] for row in loaded] == [CONTEXT] * 2
        assert {"expires_at", "size_vram"} < set(loaded[0])
        assert set((await get(served.port, "/api/version")).json["version"]) <= set("0123456789.")
        for body in ({"model": "tiny"}, {"name": "tiny:latest"}, {"model": "org/other:8b", "verbose": True}):
            shown = (await post(served.port, "/api/show", body)).json
            assert shown["capabilities"] == ["completion", "tools", "thinking"]
            assert shown["model_info"]["LlamaForCausalLM.context_length"] == CONTEXT
            assert (shown["model_info"]["general.architecture"], shown["template"]) == ("LlamaForCausalLM", "")
        assert (await post(served.port, "/api/show", {"model": "tiny:8b"})).status == 404
        assert "model" in error_of(await post(served.port, "/api/show", {}))
    async with serving(engine_of("embed"), model={"config": config}, enable_tokenizer_info_endpoint=True) as served:
        shown = (await post(served.port, "/api/show", {"model": "tiny"})).json
        assert (shown["capabilities"], shown["details"]["family"]) == (["embedding"], "tinyllama")
        assert "message.role" in shown["template"]
        refused = await ask(served)
        assert (refused.status, "chat" in error_of(refused) or "text" in error_of(refused)) == (400, True)


async def test_names_with_latest_are_known_everywhere() -> None:
    async with serving(names=("tiny", "other:latest")) as served:
        for name in ("tiny", "tiny:latest", "other", "other:latest"):
            reply = await ask(served, model=name, stream=False)
            assert (reply.status, reply.json["model"]) == (200, name)
            assert (await post(served.port, "/v1/chat/completions", {"model": name, "messages": HI})).status == 200
        for name in ("tiny:latest:latest", "tiny:8b", ":latest"):
            reply = await ask(served, model=name)
            assert (reply.status, name in error_of(reply)) == (404, True)


WRONG: list[Any] = [
    ("/api/chat", {"model": ...}, "model"),
    ("/api/chat", {"messages": "hi"}, "messages"),
    ("/api/chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ("/api/chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ("/api/chat", {"messages": [{**HI[0], "images": ["%%%"]}]}, "messages[0].images[0]"),
    ("/api/chat", {"messages": [{**HI[0], "images": ["AAAA"]}]}, "messages[0].images[0]"),
    ("/api/chat", {"messages": [{**HI[0], "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ("/api/chat", {"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}]}, "messages[1].tool_calls"),
    (
        "/api/chat",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ("/api/chat", {"tools": [{"type": "function"}]}, "tools[0].function"),
    ("/api/chat", {"tools": [{**WEATHER, "type": "web"}]}, "tools[0].type"),
    ("/api/chat", {"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    ("/api/chat", {"format": "xml"}, "format"),
    ("/api/chat", {"format": {"type": "banana"}}, "format"),
    ("/api/chat", {"think": "very"}, "think"),
    ("/api/chat", {"think": 1}, "think"),
    ("/api/chat", {"stream": "no"}, "stream"),
    ("/api/chat", {"options": {"temperature": "hot"}}, "options.temperature"),
    ("/api/chat", {"options": {"temperature": 3}}, "options.temperature"),
    ("/api/chat", {"options": {"num_predict": 0}}, "options.num_predict"),
    ("/api/chat", {"options": {"num_predict": -3}}, "options.num_predict"),
    ("/api/chat", {"options": {"top_p": 2}}, "options.top_p"),
    ("/api/chat", {"options": {"stop": ["a"] * 17}}, "options.stop"),
    ("/api/chat", {"options": {"stop": [""]}}, "options.stop[0]"),
    ("/api/chat", {"options": {"mirostat": 2}}, "options.mirostat"),
    ("/api/chat", {"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}}, "options.repeat_last_n"),
    ("/api/chat", {"options": []}, "options"),
    ("/api/chat", {"temperature": 0.5}, "options"),
    ("/api/chat", {"top_logprobs": 2}, "top_logprobs"),
    ("/api/chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("/api/chat", {"response_format": {"type": "json_object"}}, "format"),
    ("/api/generate", {"suffix": "x"}, "suffix"),
    ("/api/generate", {"template": "{{ .Prompt }}"}, "template"),
    ("/api/generate", {"context": [1, 2]}, "context"),
    ("/api/generate", {"raw": True, "images": [PIXELS]}, "images"),
    ("/api/generate", {"raw": True, "system": "S"}, "system"),
    ("/api/generate", {"images": ["AAAA"]}, "images[0]"),
    ("/api/generate", {"prompt": ["hi"]}, "prompt"),
]


async def test_what_is_wrong_is_named(marked_format: MarkedFormat) -> None:
    async with speaking("ok", sees=True) as served:
        for path, fields, named in WRONG:
            reply = await ask(served, path, **fields)
            assert reply.status == 400, (fields, reply.body)
            assert named in error_of(reply), fields
        assert served.engine.requests == []


async def test_every_refusal_has_ollamas_form() -> None:
    async with serving(limits=Limits(max_body_bytes=2000), api_key=("k",)) as served:
        key = {"Authorization": "Bearer k"}
        body = {"model": "tiny", "messages": HI}
        for reply, status in (
            (await post(served.port, "/api/chat", body), 401),
            (await get(served.port, "/api/tags"), 401),
            (await get(served.port, "/api/version"), 401),
            (await post(served.port, "/api/chat", {**body, "model": "x"}, headers=key), 404),
            (await get(served.port, "/api/chat", headers=key), 405),
            (await post(served.port, "/api/chat", b"{", headers=key), 400),
            (await post(served.port, "/api/chat", {**body, "format": "x" * 3000}, headers=key), 413),
            (await post(served.port, "/api/chat", body, headers={**key, "Origin": "http://evil"}), 403),
            *[
                (await post(served.port, f"/api/{name}", {"model": "x"}, headers=key), 501)
                for name in ("create", "pull", "push", "copy", "blobs/sha256:00")
            ],
            (await raw(served.port, request("DELETE", "/api/delete", headers=key)), 501),
        ):
            assert reply.status == status, reply.body
            assert error_of(reply)
        served.engine.state = "restarting"
        reply = await post(served.port, "/api/chat", body, headers=key)
        assert (reply.status, "retry-after" in reply.headers, bool(error_of(reply))) == (503, True, True)


async def test_bodies_are_json_whatever_curl_calls_them() -> None:
    async with serving() as served:
        for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
            body = {"model": "tiny", "messages": HI, "stream": False}
            reply = await post(served.port, "/api/chat", body, headers={"Content-Type": kind})
            assert reply.json["message"]["content"] == ANSWER
            foreign = {"Content-Type": kind, "Origin": "http://evil"}
            assert (await post(served.port, "/api/chat", body, headers=foreign)).status == 403


async def test_a_failure_before_and_after_the_first_token() -> None:
    async with speaking("some", fails=True) as served:
        assert (await ask(served, stream=False)).status == 500
        found = [json.loads(line) for line in (await ask(served)).body.decode().splitlines()]
        assert found[0]["message"]["content"] == "some"
        assert set(found[-1]) == {"error"}


async def test_a_model_without_tools_or_eyes_says_so() -> None:
    async with serving() as served:
        for fields, named in (
            ({"tools": [WEATHER]}, "tools"),
            ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, *HI]}, "messages[0].tool_calls"),
            ({"messages": [{**HI[0], "images": [PIXELS]}]}, "messages[0].images[0]"),
        ):
            reply = await ask(served, **fields)
            assert (reply.status, named in error_of(reply)) == (400, True), reply.body


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/html"),
        ("*/*", "text/html"),
        ("text/html,application/xhtml+xml;q=0.9", "text/html"),
        ("application/json", "text/plain"),
        ("text/plain, application/json;q=0.5", "text/plain"),
    ],
)
async def test_the_root_is_the_page_or_ollama(port: int, accept: str | None, kind: str) -> None:
    reply = await get(port, "/", headers={} if accept is None else {"Accept": accept})
    assert (reply.status, reply.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    assert reply.headers["vary"] == "accept"
    assert kind == "text/html" or reply.body == b"Ollama is running"


deltas = st.lists(
    st.one_of(
        st.builds(Text, st.text(" \nab{é", min_size=1, max_size=6)),
        st.builds(Reasoning, st.text(" \nxy", min_size=1, max_size=6)),
        st.tuples(
            st.sampled_from(["f", "g.h"]), st.dictionaries(st.text("ab", max_size=2), st.text('é"{'), max_size=2)
        ),
    ),
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(deltas, st.data())
def test_a_stream_says_what_the_whole_answer_says(parts: list[Any], data: st.DataObject) -> None:
    said: list[Delta] = []
    calls = 0
    for part in parts:
        if not isinstance(part, tuple):
            said.append(part)
            continue
        text = json.dumps(part[1])
        at = data.draw(st.integers(0, len(text)))
        said.append(Call(calls, part[0]))
        said += [Arguments(calls, piece) for piece in (text[:at], text[at:]) if piece]
        calls += 1
    whole = Pieces().take(said, ends=True)
    pieces, found, place = Pieces(), list[dict[str, Any]](), 0
    while place < len(said):
        step = data.draw(st.integers(1, 4))
        found.append(pieces.take(said[place : place + step]))
        place += step
    found.append(pieces.take((), ends=True))
    for field in ("content", "thinking"):
        assert "".join(line.get(field, "") for line in found) == whole.get(field, "")
    streamed = [call["function"] for line in found for call in line.get("tool_calls", ())]
    assert streamed == [call["function"] for call in whole.get("tool_calls", ())]
    assert [(call["name"], call["arguments"]) for call in streamed] == [
        part for part in parts if isinstance(part, tuple)
    ]


async def test_cut_calls_have_no_broken_arguments(marked_format: MarkedFormat) -> None:
    async with speaking() as served:
        for piece, ends, arguments in (
            ('\x03get_weather\x04{"a": "b', False, {}),
            ("\x03get_weather\x04[1]\x05", True, {"raw": "[1]"}),
        ):
            served.engine.script = says(piece, ends=ends)
            whole = (await ask(served, tools=[WEATHER], stream=False)).json
            lines = lines_of(await ask(served, tools=[WEATHER]))
            for message in (
                whole["message"],
                next(line["message"] for line in lines if "tool_calls" in line["message"]),
            ):
                assert message["tool_calls"][0]["function"]["arguments"] == arguments
