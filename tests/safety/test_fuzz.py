"""Random requests with a fixed seed, valid and not quite: never a server error, never two answers to one question."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support.demo import END, IMAGE, VIDEO
from support.live import Live, check_error, events, live

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
TINY = 5e-324
# Values at the borders of what is allowed.
FIELDS: dict[str, list[Any]] = {
    "temperature": [None, 0, TINY, 1e-9, 0.01, 0.7, 1, 2, 2.0],
    "top_p": [None, TINY, 1e-9, 0.5, 1, 1.0],
    "top_k": [None, -1, 0, 1, 5, 2**31 - 1],
    "min_p": [None, 0, TINY, 0.1, 1, 1.0],
    "presence_penalty": [None, -2, 0, 2.0],
    "frequency_penalty": [None, -2.0, TINY, 2],
    "repetition_penalty": [None, TINY, 1e-30, 0.5, 1, 1.3, 100],
    "seed": [0, 1, 2**63 - 1, -(2**63), 12345],
    "n": [None, 1, 2, 3],
    "stop": [None, [], "a", ["e", "the"], ["\n"], "\ufffd"],
    "stop_token_ids": [None, [], [0], [5, 6, VIDEO]],
    "include_stop_str_in_output": [None, True, False],
    "ignore_eos": [None, True, False],
    "min_tokens": [None, 0, 1, 6],
    "logit_bias": [
        None,
        {},
        {"5": -100, "6": 100},
        {str(token): -100 for token in range(300)},
        {str(END): 100},
        {str(IMAGE): 100.0},
    ],
    "skip_special_tokens": [None, True, False],
    "max_tokens": [6, 7, 12],
    "echo": [None, False, True],
    "user": [None, "me"],
    "add_special_tokens": [None, True, False],
    "priority": [None, 0, -5, 2**31 - 1],
    "cache_salt": [None, "", "salt"],
}
STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**70),
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "1",
    "\0",
    "é" * 300,
    [],
    [[]],
    [None],
    [1],
    ["a"],
    {},
    {"a": 1},
    {"": None},
    [{"a": []}],
    [[[[[[]]]]]],
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("demo")) as found:
        yield found


def body_of(draw: random.Random, path: str) -> dict[str, Any]:
    """A valid request with a few fields at their borders."""
    fields: dict[str, Any] = {"max_tokens": 6, "seed": 3}
    for name in draw.sample(sorted(FIELDS), draw.randrange(1, 7)):
        fields[name] = draw.choice(FIELDS[name])
    if path == CHAT:
        fields["messages"] = [{"role": "user", "content": draw.choice(["hello", "a b c " * 20, "🙂"])}]
        if draw.random() < 0.3:
            fields |= {"logprobs": True, "top_logprobs": draw.choice([None, 0, 1, 20])}
    else:
        fields["prompt"] = draw.choice(["hello", ["a", "b"], [5, 6, 7], [[8], [9, 10]]])
        if draw.random() < 0.3:
            fields["logprobs"] = draw.choice([0, 1, 20])
    return fields


def said(reply: dict[str, Any]) -> dict[int, tuple[str, str]]:
    """(text, finish reason) of every choice of a whole answer."""
    return {
        choice["index"]: (choice["text"] if "text" in choice else choice["message"]["content"], choice["finish_reason"])
        for choice in reply["choices"]
    }


def said_in_stream(text: str) -> dict[int, tuple[str, str]]:
    found: dict[int, tuple[str, str]] = {}
    for event in events(text):
        for choice in event["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            before = found.get(choice["index"], ("", None))[0]
            found[choice["index"]] = (before + piece, choice["finish_reason"])
    return found


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_r12_sampling_fields_in_all_company(demo: Live, path: str) -> None:
    draw = random.Random(path)
    for _ in range(150):
        fields = body_of(draw, path)
        reply = demo.post(path, fields)
        assert reply.status_code == 200, (fields, reply.text)
        stream = demo.post(path, {**fields, "stream": True})
        assert stream.status_code == 200, (fields, stream.text)
        if fields["seed"] is not None or fields.get("temperature") == 0:
            assert said_in_stream(stream.text) == said(reply.json()), fields
    demo.check_unharmed()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE])
def test_wrong_values_anywhere(demo: Live, path: str) -> None:
    draw = random.Random(path + "!")
    names = [
        *FIELDS,
        "messages",
        "prompt",
        "tokens",
        "model",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "best_of",
        "tools",
        "chat_template_kwargs",
        "mm_processor_kwargs",
        "response_format",
        "add_generation_prompt",
        "continue_final_message",
        "return_token_strs",
        "prompt_logprobs",
        "modalities",
        "nothing",
        "suffix",
    ]
    for _ in range(250):
        fields = (
            body_of(draw, path)
            if path in (CHAT, COMPLETIONS)
            else {"prompt": "a"}
            if path == TOKENIZE
            else {"tokens": [1]}
        )
        for _ in range(draw.randrange(1, 3)):
            fields[draw.choice(names)] = draw.choice(STRANGE)
        reply = demo.post(path, json.dumps(fields).encode())
        if reply.status_code != 200:
            error = check_error(reply, status=(400, 404))
            assert error["param"] is not None, (fields, error)
    demo.check_unharmed()


def test_wrong_values_in_messages(demo: Live) -> None:
    draw = random.Random(3)
    for _ in range(300):
        part: dict[str, Any] = {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"},
        }
        message: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "x"}, part]}
        place = draw.choice([message, part, part["image_url"], message["content"][0]])
        place[draw.choice([*place, "type", "name", "extra"])] = draw.choice(STRANGE)
        fields = {"messages": [message], "max_tokens": 2, "temperature": 0}
        reply = demo.post(draw.choice([CHAT, TOKENIZE]), json.dumps(fields).encode())
        if reply.status_code != 200:
            error = check_error(reply)
            assert str(error["param"]).startswith("messages"), (fields, error)
    demo.check_unharmed()


def test_bytes_turned_over(demo: Live) -> None:
    draw = random.Random(4)
    whole = json.dumps(body_of(random.Random(0), CHAT)).encode()
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        reply = demo.post(CHAT, bytes(broken[: draw.choice([len(broken), draw.randrange(len(broken))])]))
        if reply.status_code != 200:
            check_error(reply, status=(400, 404))
    demo.check_unharmed()
