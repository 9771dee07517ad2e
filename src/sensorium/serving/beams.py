"""Beam search: the likeliest answers to a prompt, found step by step over the engine, which knows nothing of it.

A step asks the engine for one token of every answer that goes on; the prefix cache has what they share. What is kept
and when it ends is transformers' `generate(num_beams=width)`, so answers are the same but for rounding.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from sensorium.errors import EngineError, RequestError, engine_failure
from sensorium.serving.concurrency import all_in_order
from sensorium.types import EngineOutput, Prompt, SamplingParams, TokenLogprob

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class Beams:
    """How to search. A finished answer of n tokens, its end included, is worth its log-probability / n^length_penalty.

    `early_stopping` True: `width` finished answers are enough. False: until the best that goes on would be worth less
    than the worst of them if it ended now; "never": if it had the longest length, where longer is better.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False


@dataclass(frozen=True, slots=True)
class Beam:
    """An answer so far. `score` is the sum of its tokens' log-probabilities, `worth` that of a finished one."""

    tokens: tuple[TokenLogprob, ...] = ()
    score: float = 0.0
    worth: float = 0.0

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)


@dataclass
class Search:
    """What is kept of one prompt's answers. `stops` end one, though not before `min_tokens`; `limit` is the most that
    it may have. `running` is the answers to go on with; there are none when the search is over."""

    beams: Beams
    stops: frozenset[int]
    limit: int
    min_tokens: int = 0
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    finished: list[Beam] = field(default_factory=list)

    @property
    def num_candidates(self) -> int:
        """Continuations to look at: enough that `width` of them go on, whatever ends. Of each answer as many."""
        return max(2, 1 + len(self.stops)) * self.beams.width

    def step(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> None:
        """`continuations`: of each running answer its likeliest next tokens, best first."""
        length = len(self.running[0].tokens) + 1
        banned = self.stops if length <= self.min_tokens else frozenset()
        found = [
            (beam.score + logprob, beam, TokenLogprob(token, logprob, tuple(tops)))
            for beam, tops in zip(self.running, continuations, strict=True)
            for token, logprob in tops
            if token not in banned
        ]
        found.sort(key=lambda one: -one[0])
        running: list[Beam] = []
        for rank, (score, beam, token) in enumerate(found[: self.num_candidates]):
            longer = Beam((*beam.tokens, token), score, score / length**self.beams.length_penalty)
            if token.token_id not in self.stops and length < self.limit:
                running.append(longer)
            elif rank < self.beams.width:
                self.finished.append(longer)
        self.finished.sort(key=lambda one: -one.worth)
        del self.finished[self.beams.width :]
        self.running = running[: self.beams.width]
        if self._is_over(length):
            self.running = []

    def _is_over(self, length: int) -> bool:
        if not self.running or len(self.finished) < self.beams.width:
            return False
        if self.beams.early_stopping is True:
            return True
        is_patient = self.beams.early_stopping == "never" and self.beams.length_penalty > 0
        best: float = self.running[0].score / (self.limit if is_patient else length) ** self.beams.length_penalty
        return best <= self.finished[-1].worth


class Outputs(Protocol):
    """Outputs of one answer, in order, the last with a finish reason."""

    def __aiter__(self) -> AsyncIterator[EngineOutput]: ...

    def abort(self) -> None:
        """Stop what still runs."""


Ask = Callable[[Prompt, SamplingParams], Outputs]
"""Sends a request to the engine."""


class BeamSearch:
    """One prompt's search as it runs; its answers come by `streams`, the best first, each as one output at the end."""

    def __init__(self, beams: Beams, prompt: Prompt, params: SamplingParams, ask: Ask) -> None:
        """RequestError if the answers are to be held to a form."""
        if params.grammar is not None:
            raise RequestError(
                "`use_beam_search` cannot hold answers to a form: leave out `response_format`, `structured_outputs`, a "
                "demanded tool call or `thinking_token_budget`.",
                param="use_beam_search",
            )
        stops = frozenset(params.stop_token_ids)
        self._search = Search(beams, stops, params.max_tokens, params.min_tokens)
        self._prompt = prompt
        self._params = params
        self._ask = ask
        self._task: asyncio.Task[list[EngineOutput]] | None = None
        self._first: EngineOutput | None = None
        self.streams = [BeamStream(self, place) for place in range(beams.width)]

    async def outputs(self) -> list[EngineOutput]:
        """The answers. The search begins with the first who asks."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())
        return await asyncio.shield(self._task)

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> list[EngineOutput]:
        search = self._search
        while search.running:
            search.step(await all_in_order(self._continuations(beam) for beam in search.running))
        return [self._output(place) for place in range(search.beams.width)]

    async def _continuations(self, beam: Beam) -> Sequence[tuple[int, float]]:
        asked = self._ask(_extended(self._prompt, beam.ids), self._one_token(is_first=not beam.tokens))
        try:
            async for output in asked:
                if output.finish_reason in ("error", "abort"):
                    raise engine_failure(output.error)
                if self._first is None:
                    self._first = output
                return output.logprobs[0].top
        finally:
            asked.abort()
        raise EngineError

    def _one_token(self, *, is_first: bool) -> SamplingParams:
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=self._search.num_candidates,
            prompt_logprobs=self._params.prompt_logprobs if is_first else None,
        )

    def _output(self, place: int) -> EngineOutput:
        """One answer as the engine would have given it, with the first step's figures."""
        beam, first = self._search.finished[min(place, len(self._search.finished) - 1)], self._first
        ids, most = beam.ids, self._params.logprobs
        stop = ids[-1] if ids[-1] in self._search.stops else None
        made = EngineOutput(
            0,
            ids,
            finish_reason="length" if stop is None else "stop",
            stop_token_id=stop,
            logprobs=() if most is None else tuple(replace(one, top=one.top[:most]) for one in beam.tokens),
        )
        if first is None:
            return made
        return replace(
            made,
            prompt_logprobs=first.prompt_logprobs,
            cached_tokens=first.cached_tokens,
            queue_s=first.queue_s,
            prefill_s=first.prefill_s,
        )


class BeamStream:
    """The outputs of one answer: a single one, when the search is over."""

    def __init__(self, search: BeamSearch, place: int) -> None:
        self._search = search
        self._place = place
        self._is_told = False

    def __aiter__(self) -> BeamStream:
        return self

    async def __anext__(self) -> EngineOutput:
        if self._is_told:
            raise StopAsyncIteration
        found = await self._search.outputs()
        self._is_told = True
        return found[self._place]

    def abort(self) -> None:
        self._search.abort()


def _extended(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """A prompt with an answer's tokens behind it, as if they had been written there."""
    if not ids:
        return prompt
    token_ids = np.concatenate([prompt.token_ids, np.asarray(ids, np.int32)])
    positions = prompt.positions
    if positions is not None:
        own = (np.arange(len(prompt.token_ids), len(token_ids)) + prompt.position_delta).astype(positions.dtype)
        positions = np.concatenate([positions, np.broadcast_to(own, (len(positions), len(own)))], axis=1)
    return replace(prompt, token_ids=token_ids, positions=positions)
