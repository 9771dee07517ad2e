"""Fields about tokens, as clients of vLLM send them: cut prompts, log-probabilities of prompts, words to avoid."""

from __future__ import annotations

from typing import Any

import pytest
from support.api_support import CONTEXT, TOKENIZER, VOCAB_SIZE, Served, chat, complete, events, serving

from sensorium.config import Limits

TURNS = "<|start|>user\nhi<|end|>\n<|start|>assistant\n"


def prompts_of(served: Served) -> list[str]:
    return [
        TOKENIZER.decode(one.prompt.token_ids.tolist(), skip_special_tokens=False) for one in served.engine.requests
    ]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 4}, "efgh"),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, "abcd"),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, "efgh"),
        ({"truncate_prompt_tokens": 100}, "abcdefgh"),
        ({"truncate_prompt_tokens": -1}, "abcdefgh"),
    ],
)
async def test_completions_of_cut_prompts(served: Served, fields: dict[str, Any], kept: str) -> None:
    reply = await complete(served.port, prompt="abcdefgh", echo=True, max_tokens=1, logprobs=0, **fields)
    assert prompts_of(served)[-1] == kept
    choice = reply.json["choices"][0]
    assert (choice["text"], reply.json["usage"]["prompt_tokens"]) == (kept + "G", len(kept))
    assert choice["logprobs"]["tokens"] == [*kept, "G"]
    assert choice["logprobs"]["text_offset"] == list(range(len(kept) + 1))
    await complete(served.port, prompt=TOKENIZER.encode("abcdefgh"), max_tokens=1, **fields)
    assert prompts_of(served)[-1] == kept


async def test_minus_one_leaves_room_for_the_answer(served: Served) -> None:
    for most, kept in ((20, CONTEXT - 20), (None, CONTEXT - 16)):
        reply = await complete(served.port, prompt="a" * 2000, truncate_prompt_tokens=-1, max_tokens=most)
        assert (reply.status, reply.json["usage"]["prompt_tokens"]) == (200, kept)
    long = [{"role": "user", "content": "a" * 2000}]
    for fields, kept in (({"max_tokens": 20}, CONTEXT - 20), ({}, CONTEXT - 1)):
        reply = await chat(served.port, messages=long, truncate_prompt_tokens=-1, **fields)
        assert reply.json["usage"]["prompt_tokens"] == kept
        assert prompts_of(served)[-1].endswith("aa<|end|>\n<|start|>assistant\n")


async def test_chats_of_cut_prompts(served: Served) -> None:
    for fields, kept in (({}, TURNS[-8:]), ({"truncation_side": "right"}, "<|start|>user\nhi")):
        assert (await chat(served.port, truncate_prompt_tokens=8, **fields)).status == 200
        assert prompts_of(served)[-1] == kept
    refused = await chat(served.port, truncate_prompt_tokens=CONTEXT + 1)
    assert (refused.status, refused.error["param"]) == (400, "truncate_prompt_tokens")


def entries(ids: list[int], top: int) -> list[Any]:
    """As the scripted engine makes them up: token t has log-probability -t / 100."""
    rows = []
    for token in ids[1:]:
        ranks: dict[int, int | None] = {token: None, **{other: other + 1 for other in range(top)}}
        rows.append(
            {
                str(one): {"logprob": -one / 100, "rank": rank, "decoded_token": TOKENIZER.token_text(one)[0]}
                for one, rank in ranks.items()
            }
        )
    return [None, *rows]


async def test_answers_that_are_searched_for_together(served: Served) -> None:
    """The scripted engine finds token t with log-probability -t / 100, so the likeliest answer has zeros only."""
    fields = {"prompt": "hi", "max_tokens": 3, "use_beam_search": True, "n": 3, "logprobs": 1, "return_token_ids": True}
    reply = await complete(served.port, **fields)
    choices = reply.json["choices"]
    assert choices[0]["token_ids"] == [0, 0, 0]
    assert [sum(choice["logprobs"]["token_logprobs"]) for choice in choices] == pytest.approx([0, -0.01, -0.01])
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert reply.json["usage"]["completion_tokens"] == 9
    streamed = events((await complete(served.port, **fields, stream=True)).body)
    for index, choice in enumerate(choices):
        own = [one["choices"][0] for one in streamed if one["choices"] and one["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in own) == choice["text"]
    chatted = await chat(served.port, use_beam_search=True, n=2, max_tokens=2, length_penalty=0.5, early_stopping=True)
    assert len(chatted.json["choices"]) == 2
    refused = await chat(served.port, use_beam_search=True, repetition_penalty=1.2)
    assert (refused.status, refused.error["param"]) == (400, "use_beam_search")


async def test_log_probabilities_of_prompts() -> None:
    async with serving(limits=Limits(max_logprobs=VOCAB_SIZE)) as served:
        ids = TOKENIZER.encode("hi you")
        for wanted, top in ((0, 0), (2, 2), (-1, VOCAB_SIZE)):
            reply = await complete(served.port, prompt=["hi you", "b"], prompt_logprobs=wanted, max_tokens=1)
            first, second = (choice["prompt_logprobs"] for choice in reply.json["choices"])
            assert (first, second) == (entries(ids, top), [None])
            reply = await chat(served.port, prompt_logprobs=wanted, n=2)
            assert reply.json["prompt_logprobs"] == entries(TOKENIZER.encode(TURNS), top)
        reply = await complete(served.port, prompt="hi you", prompt_logprobs=1, logprobs=3, echo=True, max_tokens=1)
        choice = reply.json["choices"][0]
        assert choice["prompt_logprobs"] == entries(ids, 1)
        assert len(choice["logprobs"]["top_logprobs"][1]) == 4
        assert (await complete(served.port)).json["choices"][0]["prompt_logprobs"] is None
        assert (await chat(served.port)).json["prompt_logprobs"] is None


async def test_what_the_engine_is_told(served: Served) -> None:
    fields = {"bad_words": ["ab"], "allowed_token_ids": [5, 6], "logprob_token_ids": [9]}
    await chat(served.port, **fields, logprobs=True)
    await complete(served.port, **fields, logprobs=1)
    for asked in served.engine.requests[-2:]:
        assert asked.sampling is not None
        words = tuple(tuple(TOKENIZER.encode(text)) for text in ("ab", " ab"))
        assert asked.sampling.bad_words == words
        assert (asked.sampling.allowed_token_ids, asked.sampling.logprob_token_ids) == ((5, 6), (9,))
