"""One answer on its way: engine outputs in, text out, and everything that both endpoints report about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from sensorium.api.context import Entry
from sensorium.api.metrics import ModelMetrics
from sensorium.api.protocol.sampling import SamplingBody
from sensorium.errors import EngineError, SensoriumError, UnavailableError
from sensorium.prompt.detokenize import Detokenizer
from sensorium.serving.concurrency import all_in_order
from sensorium.serving.defaults import for_choice
from sensorium.types import EngineOutput, EngineRequest, Prompt, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from sensorium.ipc.client import OutputStream

Emit = Callable[["Answer", str], Awaitable[None]]


class Answer:
    """One of the `n` answers to one prompt. `take` is called once per engine output and must stay cheap."""

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_metrics",
        "_model_stops",
        "_one_by_one",
        "cached_tokens",
        "finish_reason",
        "first_s",
        "index",
        "last_s",
        "logprobs",
        "num_tokens",
        "prompt_logprobs",
        "started_s",
        "stop_reason",
        "stream",
    )

    def __init__(
        self,
        index: int,
        stream: OutputStream,
        detokenizer: Detokenizer,
        request: SamplingBody,
        params: SamplingParams,
        metrics: ModelMetrics,
        started_s: float,
    ) -> None:
        self.index = index
        self.stream = stream
        self._detokenizer = detokenizer
        self._include_stop = bool(request.include_stop_str_in_output)
        self._model_stops = frozenset(params.stop_token_ids) - frozenset(request.stop_token_ids or ())
        self._one_by_one = bool(request.stop_strings)  # so that tokens after a stop string are not counted
        self._metrics = metrics
        self.started_s = started_s
        self.first_s = 0.0
        self.last_s = 0.0
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.logprobs: list[TokenLogprob] = []  # not yet reported
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    def take(self, output: EngineOutput) -> str:
        """The text that an output adds. Sets `finish_reason` when it was the last one."""
        if output.finish_reason == "error":
            raise EngineError(output.error) if output.error else EngineError()
        if output.finish_reason == "abort":
            raise UnavailableError("The request was ended by the server.")
        tokens = output.token_ids
        self._observe(len(tokens), output)
        if self._one_by_one and len(tokens) > 1:
            return self._take_one_by_one(output)
        self._count(len(tokens))
        if output.logprobs:
            self.logprobs.extend(output.logprobs)
        if output.finish_reason is None:
            text = self._detokenizer.push(tokens)
            if self._one_by_one and self._detokenizer.stop_reason is not None:
                self._stop(self._detokenizer.stop_reason)
            return text
        return self._take_last(output, tokens)

    def _take_one_by_one(self, output: EngineOutput) -> str:
        text = ""
        last = len(output.token_ids) - 1
        for place, token in enumerate(output.token_ids):
            self._count(1)
            self.logprobs.extend(output.logprobs[place : place + 1])
            if place == last and output.finish_reason is not None:
                return text + self._take_last(output, (token,))
            text += self._detokenizer.push((token,))
            if self._detokenizer.stop_reason is not None:
                self._stop(self._detokenizer.stop_reason)
                break
        return text

    def _take_last(self, output: EngineOutput, tokens: Sequence[int]) -> str:
        """The end that the engine found. An end token's text is only shown where stop strings are."""
        hidden = output.stop_token_id is not None and not self._include_stop
        text = self._detokenizer.push(tokens[:-1] if hidden else tokens)
        if self._detokenizer.stop_reason is None:
            text += self._detokenizer.flush()
        if self._detokenizer.stop_reason is not None:
            self._stop(self._detokenizer.stop_reason)
            return text
        self.finish_reason = output.finish_reason
        if output.stop_token_id is not None and output.stop_token_id not in self._model_stops:
            self.stop_reason = output.stop_token_id
        return text

    def _stop(self, reason: str) -> None:
        self.finish_reason = "stop"
        self.stop_reason = reason

    def _count(self, tokens: int) -> None:
        self.num_tokens += tokens
        self._metrics.generation_tokens += tokens  # as they come, so that a throughput over seconds means something

    def _observe(self, tokens: int, output: EngineOutput) -> None:
        now_s = perf_counter()
        if self.first_s:
            if tokens:
                self._metrics.inter_token_s.observe((now_s - self.last_s) / tokens)
        else:
            self.first_s = now_s
            self._metrics.first_token_s.observe(now_s - self.started_s)
            self.cached_tokens = output.cached_tokens
            self.prompt_logprobs = output.prompt_logprobs
        self.last_s = now_s

    def take_logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities since the last call."""
        taken, self.logprobs = self.logprobs, []
        return taken

    async def run(self, emit: Emit) -> None:
        """Give every piece of text to `emit` as it comes, to the end."""
        async for output in self.stream:
            text = self.take(output)
            await emit(self, text)
            if self.finish_reason is not None:
                return
        raise EngineError


@dataclass(slots=True)
class Answers:
    """All answers to one HTTP request, in the order of their index. Leaving the block ends what still runs."""

    prompts: tuple[Prompt, ...]
    metrics: ModelMetrics
    started_s: float  # when the request came, on perf_counter's clock
    answers: list[Answer] = field(default_factory=list)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for answer in self.answers:
            answer.stream.abort()
        self._count(kind)

    def _count(self, kind: type[BaseException] | None) -> None:
        metrics, now_s = self.metrics, perf_counter()
        for answer in self.answers:
            unfinished = "error" if kind is not None and issubclass(kind, SensoriumError) else "abort"
            metrics.finished[answer.finish_reason or unfinished] += 1
            metrics.request_generation_tokens.observe(answer.num_tokens)
            if answer.num_tokens > 1:
                metrics.time_per_token_s.observe((answer.last_s - answer.first_s) / (answer.num_tokens - 1))
        metrics.prompt_tokens += self.prompt_tokens
        metrics.cached_tokens += self.cached_tokens
        for prompt in self.prompts:
            metrics.request_prompt_tokens.observe(len(prompt.token_ids))
        metrics.request_s.observe(now_s - self.started_s)

    async def run(self, emit: Emit) -> None:
        if len(self.answers) == 1:
            await self.answers[0].run(emit)
            return
        # The first failure ends them all, and nothing may still be written after it.
        await all_in_order(answer.run(emit) for answer in self.answers)

    async def collect(self) -> list[str]:
        """The whole text of every answer."""
        pieces: list[list[str]] = [[] for _ in self.answers]

        async def keep(answer: Answer, text: str) -> None:
            pieces[answer.index].append(text)

        await self.run(keep)
        return ["".join(texts) for texts in pieces]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, each counted once: its first answer says what was found."""
        per_prompt = max(1, len(self.answers) // len(self.prompts))
        return sum(answer.cached_tokens for answer in self.answers[::per_prompt])

    @property
    def completion_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    def usage(self, *, completion_tokens: int | None = None) -> dict[str, object]:
        """OpenAI's usage, with what was cached and what was media. A prompt counts once, not `n` times."""
        prompt_tokens = self.prompt_tokens
        completion = self.completion_tokens if completion_tokens is None else completion_tokens
        details = {"cached_tokens": self.cached_tokens, "multimodal_tokens": self._media_tokens()}
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": details,
        }

    def usage_without(self, unsent: int) -> dict[str, object]:
        """The same before the client has the last tokens."""
        return self.usage(completion_tokens=self.completion_tokens - unsent)

    def _media_tokens(self) -> dict[str, int] | None:
        counts: dict[str, int] = {}
        for prompt in self.prompts:
            for span in prompt.spans:
                kind = prompt.media[span.item].kind
                counts[kind] = counts.get(kind, 0) + span.length
        return counts or None


def ask(
    entry: Entry,
    request: SamplingBody,
    prompts: Sequence[tuple[Prompt, SamplingParams]],
    salt: bytes,
    *,
    started_s: float,
    continues: bool,
) -> Answers:
    """Send one engine request per answer: `n` to each prompt, prompt by prompt.

    `continues` says that the answer goes on in the middle of the prompt's text, so that a space at its start counts.
    """
    client, metrics = entry.model.client, entry.metrics
    answers = Answers(tuple(prompt for prompt, _ in prompts), metrics, started_s)
    with ExitStack() as undo:  # a client that is lost half way takes those with it that were sent
        undo.push(answers)
        for prompt, params in prompts:
            for choice in range(request.choices):
                own = for_choice(params, choice)
                stream = client.submit(
                    EngineRequest(client.next_id(), prompt, sampling=own, priority=request.priority or 0, salt=salt)
                )
                detokenizer = Detokenizer(
                    entry.model.tokenizer,
                    skip_special_tokens=not request.keeps_special_tokens,
                    stop=request.stop_strings,
                    include_stop=bool(request.include_stop_str_in_output),
                    min_tokens=own.min_tokens,
                    keep_leading_space=continues,
                )
                answers.answers.append(
                    Answer(len(answers.answers), stream, detokenizer, request, own, metrics, started_s)
                )
            metrics.request_n.observe(request.choices)
            metrics.request_max_tokens.observe(params.max_tokens)
        undo.pop_all()
    return answers
