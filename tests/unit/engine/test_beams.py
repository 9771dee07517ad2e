"""Beam search over the engine, against transformers' own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.engine_harness import Bench, bench, image_request, random_prompt, request

from sensorium.errors import RequestError
from sensorium.models.base import Model
from sensorium.serving.beams import Beams, BeamSearch
from sensorium.types import EngineOutput, EngineRequest, Grammar, Prompt, SamplingParams

PROMPT = random_prompt(6, 21)
TOKENS = 9
PAD = 1


class Asked:
    """One request, computed at once."""

    def __init__(self, made: Bench, asked: EngineRequest) -> None:
        [found] = made.run(asked)
        self._output = EngineOutput(
            asked.id,
            tuple(found.tokens),
            finish_reason=found.reason,
            logprobs=tuple(found.logprobs),
            prompt_logprobs=found.prompt_logprobs,
            cached_tokens=found.cached,
        )

    async def __aiter__(self) -> AsyncIterator[EngineOutput]:
        yield self._output

    def abort(self) -> None:
        pass


def searching(made: Bench, prompt: Prompt, beams: Beams, **params: Any) -> BeamSearch:
    def ask(asked: Prompt, own: SamplingParams) -> Asked:
        return Asked(made, EngineRequest(request(()).id, asked, sampling=own))

    return BeamSearch(beams, prompt, SamplingParams(**{"max_tokens": TOKENS, **params}), ask)


async def found(made: Bench, prompt: Prompt, beams: Beams, **params: Any) -> list[EngineOutput]:
    search = searching(made, prompt, beams, **params)
    return [output for stream in search.streams async for output in stream]


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made(model: Model) -> Bench:
    return bench(model)


def stops_for(theirs: Any, count: int) -> list[int]:
    """Tokens that end answers soon: some of the likeliest first ones, others by chance."""
    logits = theirs(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    return [*logits.topk(2 + count).indices[2:].tolist(), *random_prompt(count, 4 * count)]


@pytest.mark.parametrize(
    ("width", "length_penalty", "early_stopping", "num_stops", "min_tokens"),
    [
        (4, 1.0, False, 3, 0),
        (3, 0.0, "never", 6, 0),
        (4, 1.0, True, 3, 0),
        (2, 2.5, "never", 3, 0),
        (5, -1.0, False, 4, 0),
        (3, 1.0, False, 6, 4),
        (4, 1.0, False, 0, 0),
    ],
)
async def test_finds_what_transformers_finds(
    made: Bench, theirs: Any, width: int, length_penalty: float, early_stopping: Any, num_stops: int, min_tokens: int
) -> None:
    stops = list(dict.fromkeys(stops_for(theirs, num_stops))) if num_stops else []
    expected = theirs.generate(
        torch.tensor([PROMPT]),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=TOKENS,
        min_new_tokens=min_tokens or None,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=stops or None,
        pad_token_id=PAD,
    )[:, len(PROMPT) :].tolist()
    outputs = await found(
        made,
        request(PROMPT).prompt,
        Beams(width, length_penalty, early_stopping),
        stop_token_ids=tuple(stops),
        min_tokens=min_tokens,
    )
    longest = max(map(len, expected))
    assert [[*output.token_ids, *[PAD] * (longest - len(output.token_ids))] for output in outputs] == expected
    for output in outputs:
        ended = output.token_ids[-1] in stops
        assert (output.finish_reason, output.stop_token_id) == (
            ("stop", output.token_ids[-1]) if ended else ("length", None)
        )
    if num_stops and not min_tokens and length_penalty <= 1:
        assert any(output.finish_reason == "stop" for output in outputs)


async def test_one_beam_is_the_greedy_answer_also_behind_an_image(made: Bench, model: Model) -> None:
    """With the log-probabilities that were asked for, and those of the prompt."""
    asked = image_request(1, max_tokens=6, logprobs=2, prompt_logprobs=1)
    [greedy] = made.run(asked)
    [output] = await found(made, asked.prompt, Beams(1), max_tokens=6, logprobs=2, prompt_logprobs=1)
    assert list(output.token_ids) == greedy.tokens
    assert [one.token_id for one in output.logprobs] == greedy.tokens
    assert [one.logprob for one in output.logprobs] == pytest.approx([one.logprob for one in greedy.logprobs], abs=1e-5)
    assert [len(one.top) for one in output.logprobs] == [2] * 6
    assert len(output.prompt_logprobs) == len(greedy.prompt_logprobs)


def test_answers_of_a_form_are_refused(made: Bench) -> None:
    with pytest.raises(RequestError, match="use_beam_search"):
        searching(made, request(PROMPT).prompt, Beams(2), grammar=Grammar("regex", "a"))


async def test_a_failed_step_fails_every_answer(made: Bench) -> None:
    """The prompt does not fit."""
    search = searching(made, request(random_prompt(1, 2000)).prompt, Beams(2))
    for stream in search.streams:
        with pytest.raises(Exception, match=r".+"):
            await anext(aiter(stream))
