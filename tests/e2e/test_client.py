"""Everything the API offers, as OpenAI's own client asks for it and reads it, from a whole server."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from support import pictures
from support.demo import END, VOCAB_SIZE
from support.live import Live, check_error, live, until

MODEL = "sensorium-demo"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("demo"), "--allow-request-mm-kwargs", "--allow-request-chat-template") as found:
        yield found


@pytest.fixture(scope="module")
def client(demo: Live) -> OpenAI:
    return OpenAI(base_url=f"{demo.url}/v1", api_key="EMPTY", max_retries=0)


def shown(width: int = 84, height: int = 56) -> dict[str, Any]:
    payload = base64.b64encode(pictures.encoded(pictures.photo(width, height))).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}", "detail": "high"}}


def chat(client: OpenAI, messages: Any = None, *, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(
        model=MODEL,
        messages=messages or HELLO,
        **{**defaults, **fields},
        extra_body={"ignore_eos": True, **(extra or {})},
    )


def complete(client: OpenAI, prompt: Any = "hello", *, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    return client.completions.create(
        model=MODEL, prompt=prompt, **{**defaults, **fields}, extra_body={"ignore_eos": True, **(extra or {})}
    )


def say(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, list[Any]], dict[int, str], Any]:
    """Text, log-probabilities and finish reasons by choice, and the usage at the end."""
    texts: dict[int, str] = {}
    logprobs: dict[int, list[Any]] = {}
    reasons: dict[int, str] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (delta or "")
            assert choice.index not in reasons
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
            if choice.logprobs is not None:
                logprobs.setdefault(choice.index, []).append(choice.logprobs)
    return texts, logprobs, reasons, usage


# Chat


def test_shape_of_an_answer(client: OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_shape_of_a_stream(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all("finish_reason" in chunk.choices[0].model_fields_set for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    assert streamed(chunks)[0] == {0: say(chat(client))}


def test_usage_in_streams(client: OpenAI) -> None:
    whole = chat(client).usage
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    running = list(chat(client, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    counts = [chunk.usage.completion_tokens for chunk in running]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert {chunk.usage.prompt_tokens for chunk in running} == {whole.prompt_tokens}


def test_n(client: OpenAI) -> None:
    for stream in (False, True):
        answer = chat(
            client,
            n=4,
            temperature=2,
            seed=3,
            max_tokens=40,
            stream=stream,
            logprobs=True,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        if stream:
            texts, logprobs, reasons, usage = streamed(answer)
            assert {
                index: sum(len(piece.content) for piece in pieces) for index, pieces in logprobs.items()
            } == dict.fromkeys(range(4), 40)
        else:
            texts = {choice.index: choice.message.content for choice in answer.choices}
            reasons = {choice.index: choice.finish_reason for choice in answer.choices}
            usage = answer.usage
            first = texts
        assert sorted(texts) == [0, 1, 2, 3]
        assert set(reasons.values()) == {"length"}
        assert len(set(texts.values())) == 4
        assert usage.completion_tokens == 160
        assert usage.prompt_tokens == chat(client).usage.prompt_tokens
    assert texts == first
    assert say(chat(client, temperature=2, seed=3, max_tokens=40)) == first[0]


def test_logprobs_of_chats(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=5)
    found = answer.choices[0].logprobs.content
    assert len(found) == 12
    for entry in found:
        assert len(entry.top_logprobs) == 5
        assert entry.top_logprobs[0].bytes == entry.bytes
        assert entry.top_logprobs[0].logprob == entry.logprob
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0001
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    _, pieces, _, _ = streamed(chat(client, logprobs=True, top_logprobs=5, stream=True))
    assert [entry for piece in pieces[0] for entry in piece.content] == found
    assert all(entry.top_logprobs == [] for entry in chat(client, logprobs=True).choices[0].logprobs.content)
    # What is said about a token does not depend on how the next one is chosen.
    warm = chat(client, logprobs=True, top_logprobs=20, temperature=1.5, seed=1, top_p=0.5)
    assert len(warm.choices[0].logprobs.content[0].top_logprobs) == 20
    assert warm.choices[0].logprobs.content[0].top_logprobs[:5] == found[0].top_logprobs


def test_stop_strings(client: OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 40}
    whole = say(chat(client, **fields))
    stop = next(whole[start : start + 2] for start in range(5, len(whole)) if "\ufffd" not in whole[start : start + 2])
    for given in (stop, [stop], ["\0never", stop]):
        answer = chat(client, stop=given, **fields)
        assert say(answer) == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].stop_reason == stop
        assert answer.usage.completion_tokens <= 40
    shown_too = chat(client, stop=stop, **fields, extra={"include_stop_str_in_output": True})
    assert say(shown_too) == whole[: whole.index(stop) + 2]
    assert complete(client, "hello", stop=["\0never"]).choices[0].finish_reason == "length"


def force(token: int) -> dict[str, float]:
    return {str(token): 100.0}


def test_logit_bias_and_end_tokens(client: OpenAI, demo: Live) -> None:
    token = demo.post("/tokenize", {"prompt": " the", "add_special_tokens": False}).json()["tokens"][0]
    piece = demo.post("/detokenize", {"tokens": [token]}).json()["prompt"]
    assert say(chat(client, logit_bias=force(token))) == piece * 12
    ended = chat(client, logit_bias=force(END), extra={"ignore_eos": False})
    assert (say(ended), ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 1)
    assert ended.choices[0].stop_reason is None
    assert chat(client, logit_bias=force(END)).usage.completion_tokens == 12  # ignore_eos
    for minimum in (1, 5, 12):
        answer = chat(client, logit_bias=force(END), extra={"ignore_eos": False, "min_tokens": minimum})
        assert answer.usage.completion_tokens == min(minimum + 1, 12)
    stopped = chat(client, logit_bias=force(token), extra={"stop_token_ids": [token]})
    assert (say(stopped), stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.choices[0].stop_reason == token
    shown_too = chat(
        client, logit_bias=force(token), extra={"stop_token_ids": [token], "include_stop_str_in_output": True}
    )
    assert say(shown_too) == piece
    special = chat(client, logit_bias=force(END), max_tokens=2, extra={"skip_special_tokens": False})
    assert say(special) == "<|im_end|>" * 2
    assert say(chat(client, logit_bias=force(END), max_tokens=2)) == ""


def test_penalties_and_filters(client: OpenAI) -> None:
    plain = say(chat(client, max_tokens=30))
    assert say(chat(client, max_tokens=30, temperature=1.0, extra={"top_k": 1})) == plain
    assert say(chat(client, max_tokens=30, temperature=1.0, top_p=1e-6)) == plain
    assert say(chat(client, max_tokens=30, temperature=1.0, extra={"min_p": 1.0})) == plain
    assert say(chat(client, max_tokens=30, extra={"top_k": -1, "min_p": 0, "repetition_penalty": 1.0})) == plain
    forced = chat(client, logit_bias=force(100), logprobs=True).choices[0].logprobs.content
    assert len({entry.token for entry in forced}) == 1
    punished = chat(
        client, logit_bias={"100": 3.0, "101": 2.9}, frequency_penalty=2.0, presence_penalty=2.0, max_tokens=60
    )
    assert punished.usage.completion_tokens == 60
    assert chat(client, extra={"repetition_penalty": 1.8}, max_tokens=60).usage.completion_tokens == 60


def test_seeds(client: OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 2, "max_tokens": 48}
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda seed: say(chat(client, seed=seed, **fields)), [1, 2, 1, 2, 1, 2]))
    assert len(set(found)) == 2
    assert found[0] == found[2] == found[4]
    assert len({say(chat(client, **fields)) for _ in range(4)}) == 4
    assert len({say(chat(client, seed=-1, **fields)) for _ in range(3)}) == 3
    for seed in (0, 2**63 - 1, -(2**63)):
        assert say(chat(client, seed=seed, **fields)) == say(chat(client, seed=seed, **fields))


def test_continuing_and_generation_prompts(client: OpenAI, demo: Live) -> None:
    begun: list[Any] = [*HELLO, {"role": "assistant", "content": "I think that"}]

    def prompt(messages: Any, **fields: Any) -> str:
        tokens = demo.post("/tokenize", {"messages": messages, **fields}).json()["tokens"]
        return str(demo.post("/detokenize", {"tokens": tokens}).json()["prompt"])

    assert prompt(begun, continue_final_message=True, add_generation_prompt=False).endswith("assistant\nI think that")
    assert prompt(begun).endswith("I think that<|im_end|>\n<|im_start|>assistant\n")
    assert prompt(HELLO, add_generation_prompt=False).endswith("hello<|im_end|>\n")
    continued = chat(client, begun, extra={"continue_final_message": True, "add_generation_prompt": False})
    raw = complete(client, prompt(begun, continue_final_message=True, add_generation_prompt=False))
    assert say(continued) == raw.choices[0].text
    echoed = chat(client, begun, extra={"continue_final_message": True, "add_generation_prompt": False, "echo": True})
    assert say(echoed) == "I think that" + say(continued)
    texts, _, _, _ = streamed(
        chat(
            client,
            begun,
            stream=True,
            extra={"continue_final_message": True, "add_generation_prompt": False, "echo": True},
        )
    )
    assert texts[0] == say(echoed)


def test_chat_equals_completion_of_its_prompt(client: OpenAI, demo: Live) -> None:
    tokens = demo.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    text = demo.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert complete(client, tokens).choices[0].text == complete(client, text).choices[0].text == say(chat(client))


def test_conversations_with_pictures_anywhere(client: OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": [shown(), {"type": "text", "text": "and"}, shown(56, 112)]},
        {"role": "assistant", "content": "a picture"},
        {"role": "user", "content": [{"type": "text", "text": "and this?"}, shown(112, 112)]},
    ]
    answer = chat(client, messages)
    details = answer.usage.prompt_tokens_details
    assert details.model_extra["multimodal_tokens"] == {"image": 3 * 5 + 3 * 5 + 4 * 4}
    again = chat(client, messages)
    assert say(again) == say(answer)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert streamed(chat(client, messages, stream=True))[0][0] == say(answer)


def test_media_settings_where_allowed(client: OpenAI) -> None:
    def rows(**settings: Any) -> int:
        answer = chat(
            client,
            [{"role": "user", "content": [shown(560, 560)]}],
            max_tokens=1,
            extra={"mm_processor_kwargs": settings},
        )
        return int(answer.usage.prompt_tokens_details.model_extra["multimodal_tokens"]["image"])

    assert rows() == 16
    assert rows(max_pixels=560 * 560) == 400
    with pytest.raises(openai.BadRequestError) as caught:
        rows(wrong=1)
    assert "wrong" in caught.value.message


def test_templates_where_allowed(client: OpenAI) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ mood }}"
    plain = complete(client, "hellowow").choices[0].text
    assert say(chat(client, extra={"chat_template": source, "chat_template_kwargs": {"mood": "wow"}})) == plain
    for bad in (
        "{% for",
        "{{ messages[0].__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{% include 'x' %}",
        "{{ raise_exception('no') }}",
    ):
        with pytest.raises(openai.BadRequestError):
            chat(client, extra={"chat_template": bad})


# Completions


def test_completions_of_many_prompts(client: OpenAI) -> None:
    prompts = ["hello", "one two three", "x"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    answer = complete(client, prompts)
    assert answer.object == "text_completion"
    assert [choice.text for choice in answer.choices] == alone
    assert answer.usage.completion_tokens == 36
    texts, _, reasons, _ = streamed(complete(client, prompts, stream=True))
    assert [texts[index] for index in range(3)] == alone
    assert set(reasons.values()) == {"length"}
    two = complete(client, prompts, n=2, temperature=1.0, seed=5)
    assert [choice.index for choice in two.choices] == list(range(6))
    assert two.usage.prompt_tokens == answer.usage.prompt_tokens
    ids = [[5, 6, 7], [8, 9]]
    assert [choice.text for choice in complete(client, ids).choices] == [
        complete(client, one).choices[0].text for one in ids
    ]
    assert complete(client).usage.completion_tokens == 12
    usage = client.completions.create(model=MODEL, prompt="hello", extra_body={"ignore_eos": True}).usage
    assert usage is not None and usage.completion_tokens == 16


def test_logprobs_and_echo_of_completions(client: OpenAI, demo: Live) -> None:
    prompt = "hello there, world"
    ids = demo.post("/tokenize", {"prompt": prompt}).json()["tokens"]
    plain = complete(client, prompt, logprobs=3)
    found = plain.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 12
    assert "".join(found.tokens).startswith(plain.choices[0].text[:5])
    assert all(1 <= len(top) <= 4 for top in found.top_logprobs)
    echoed = complete(client, prompt, logprobs=3, echo=True)
    assert echoed.choices[0].text == prompt + plain.choices[0].text
    both = echoed.choices[0].logprobs
    assert len(both.tokens) == len(ids) + 12
    assert both.token_logprobs[0] is None
    assert both.top_logprobs[0] is None
    assert "".join(both.tokens[: len(ids)]) == prompt
    assert both.token_logprobs[len(ids) :] == pytest.approx(found.token_logprobs, abs=1e-2)
    scored = complete(client, prompt, logprobs=3, echo=True, max_tokens=0)
    assert scored.choices[0].text == prompt
    assert scored.choices[0].finish_reason == "length"
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(both.token_logprobs[1 : len(ids)], abs=1e-2)
    texts, pieces, _, usage = streamed(
        complete(client, prompt, logprobs=3, echo=True, stream=True, stream_options={"include_usage": True})
    )
    assert texts[0] == echoed.choices[0].text
    assert [token for piece in pieces[0] for token in piece.tokens] == both.tokens
    assert [offset for piece in pieces[0] for offset in piece.text_offset] == both.text_offset
    assert usage.completion_tokens == 12
    assert complete(client, ids, echo=True).choices[0].text == echoed.choices[0].text
    assert len(complete(client, prompt, logprobs=0).choices[0].logprobs.tokens) == 12


# Errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 30, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "x"},
                            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}},
                        ],
                    }
                ]
            },
            "messages[0].content[1].image_url.url",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                    },
                ]
            },
            "messages[1].content[0].image_url.url",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_errors_are_raised_with_their_place(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        if stream and "stream_options" in fields:
            continue
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "stream": stream, **fields})
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert caught.value.code
        assert caught.value.request_id


def test_other_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    for call in (
        lambda: client.images.generate(prompt="x", model=MODEL),
        lambda: client.responses.retrieve("resp_1"),
        lambda: client.moderations.create(input="x"),
        client.files.list,
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert client.chat.completions.create(model="", messages=HELLO, max_tokens=1).model == MODEL


# Everything else


def test_models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [one.id for one in listed] == [MODEL]
    one = client.models.retrieve(MODEL)
    assert one == listed[0]
    assert one.model_extra is not None and one.model_extra["max_model_len"] == 32768
    assert one.created > 1.6e9


def test_tokenize_and_detokenize(demo: Live) -> None:
    for text in ("hello world", "Grüße 你好 🙂", " \n\t ", "<|im_start|>user\n<|im_end|>", "a" * 5000):
        found = demo.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == 32768
        assert demo.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    assert demo.post("/tokenize", {"prompt": "x"}).json()["token_strs"] is None
    media = demo.post("/tokenize", {"messages": [{"role": "user", "content": [shown()]}]}).json()
    answer = demo.chat([shown()]).json()
    assert media["count"] == answer["usage"]["prompt_tokens"]
    assert demo.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    check_error(demo.post("/detokenize", {"tokens": [VOCAB_SIZE]}), param="tokens")
    check_error(demo.post("/detokenize", {"tokens": [-1]}), param="tokens[0]")
    check_error(demo.post("/tokenize", {}), param="prompt")
    check_error(demo.post("/tokenize", {"prompt": "x", "messages": HELLO}), param="prompt")
    assert demo.post("/tokenize", {"prompt": ""}).json()["count"] == 0


def test_metrics_count_what_happened(demo: Live, client: OpenAI) -> None:
    names = {
        "prompt": "vllm:prompt_tokens_total",
        "generation": "vllm:generation_tokens_total",
        "length": "vllm:request_success_total",
        "e2e": "vllm:e2e_request_latency_seconds_count",
        "ttft": "vllm:time_to_first_token_seconds_count",
    }
    before = {key: demo.metric(name) for key, name in names.items()}
    answer = chat(client, n=2, temperature=1.0)
    after = {key: demo.metric(name) - before[key] for key, name in names.items()}
    assert after["prompt"] == answer.usage.prompt_tokens
    assert after["generation"] == 24
    assert after["length"] == 2
    assert after["e2e"] == 1
    chat(client, [{"role": "user", "content": [shown(96, 64)]}])  # so that media were decoded, and none from a cache
    until(lambda: "sensorium:media_decode_seconds" in demo.http.get("/metrics").text)
    found = {family.name: family for family in text_string_to_metric_families(demo.http.get("/metrics").text)}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits",
        "vllm:prefix_cache_queries",
        "vllm:num_preemptions",
        "vllm:cache_config_info",
        "vllm:inter_token_latency_seconds",
        "vllm:request_prompt_tokens",
        "vllm:mm_cache_hits",
        "sensorium:media_fetch_seconds",
        "sensorium:media_decode_seconds",
    ):
        assert name in found, name
        assert found[name].samples
        assert found[name].documentation
    for family in found.values():
        if family.type == "histogram":
            counts = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
            assert all(value >= 0 for value in counts)


def test_health_and_description(demo: Live) -> None:
    for path in ("/livez", "/readyz", "/health"):
        for prefix in ("", "/api/v1"):
            assert demo.http.get(prefix + path).status_code == 200, prefix + path
        assert demo.http.head(path).status_code == 200
        assert demo.http.head(path).content == b""
    assert demo.http.get("/health").content == b""
    assert demo.http.get("/version").json()["version"]
    page = demo.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    described = demo.http.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    for path in (
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/livez",
        "/readyz",
        "/health",
        "/metrics",
        "/version",
    ):
        assert path in described["paths"]
        assert demo.http.get("/api/v1" + path.removeprefix("/v1")).status_code in (200, 405)


def test_names_keys_and_a_path_in_front(tmp_path: Path) -> None:
    """As behind a reverse proxy, with several names and keys, some from the environment."""
    with live(
        tmp_path,
        "--api-key",
        "one",
        "--api_key",
        "two",
        "--served-model-name",
        "a",
        "b.c",
        "--root-path",
        "/sens",
        key="one",
    ) as served:
        for key in ("one", "two"):
            for base in ("/v1", "/api/v1", "/sens/v1", "/sens/api/v1"):
                client = OpenAI(base_url=served.url + base, api_key=key, max_retries=0)
                assert [model.id for model in client.models.list()] == ["a", "b.c"]
        assert client.models.retrieve("b.c").id == "b.c"
        for name in ("a", "b.c"):
            answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=1)
            assert answer.model == name
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=MODEL, messages=HELLO)
        for key in ("three", "onetwo", "one,two"):
            with pytest.raises(openai.AuthenticationError):
                OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0).models.list()
        assert httpx.get(f"{served.url}/sens/docs", headers={"Authorization": "Bearer one"}).status_code == 200
        served.check_unharmed()
