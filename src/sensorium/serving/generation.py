"""Prompts in, typed deltas out: what every endpoint that generates shares, whatever its JSON looks like.

A `Generation` is all choices of one request. Each `Choice` turns engine outputs into deltas (text, reasoning, tool
calls), counts its tokens and knows how it ended. Nothing here knows HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from sensorium.errors import EngineError, SensoriumError, UnavailableError, engine_failure
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Scanner, Text
from sensorium.prompt.output import OutputText, PlainOutput, ScannedOutput, TextOptions
from sensorium.serving.beams import Beams, BeamSearch, Outputs
from sensorium.serving.concurrency import all_in_order
from sensorium.serving.defaults import for_choice
from sensorium.serving.media import MediaTiming
from sensorium.serving.model import ServedModel
from sensorium.types import EngineOutput, EngineRequest, Prompt, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from sensorium.ipc.client import OutputStream

Emit = Callable[["Choice", Sequence[Delta]], Awaitable[None]]


class GenerationObserver(Protocol):
    """Who counts. Called for every engine output: must stay cheap."""

    def observe_prompt(self, text_s: float, media: Iterable[MediaTiming] = ()) -> None:
        """Making a prompt took so long."""

    def asked(self, choices: int, max_tokens: int) -> None:
        """A prompt was sent with so many choices."""

    def first_output(self, wait_s: float, queue_s: float, prefill_s: float) -> None:
        """A choice began, so long after its request had come; of that it waited in the engine, and was computed."""

    def generated(self, tokens: int, since_s: float) -> None:
        """A choice has new tokens. `since_s` is the time since the ones before, 0 for the first."""

    def choice_ended(self, reason: str, tokens: int, *, prefill_s: float, decode_s: float, preemptions: int) -> None:
        """`reason` is stop, length, abort or error. `decode_s` is the time from the first token to the last."""

    def request_ended(
        self, prompt_tokens: Sequence[int], cached_tokens: int, seconds: float, longest: Sequence[int]
    ) -> None:
        """With the length of each prompt and of its longest choice, and the time since the request came."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`choices` answers to each prompt, in the order of the prompts.

    `stop_token_ids` are those that the request itself named: only these are told as the reason of a stop. `scanner`
    makes a reader of the model's format for each choice; without one, everything is text. `markers` are the ids of
    special tokens which it has to see. `hides_reasoning`: the client does not want it, nor anything about its tokens.
    `keeps_ids`: the ids of tokens are wanted too. `call_reason`: why an answer ends that calls tools. `beams`: the
    choices are searched for together, and each comes whole.
    """

    prompts: tuple[tuple[Prompt, SamplingParams], ...]
    text: TextOptions = field(default_factory=TextOptions)
    choices: int = 1
    salt: bytes = b""
    priority: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    scanner: Callable[[], Scanner] | None = None
    markers: frozenset[int] = frozenset()
    hides_reasoning: bool = False
    keeps_ids: bool = False
    call_reason: str = "tool_calls"
    adapter: int = 0
    beams: Beams | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt, _ in self.prompts)

    def output_text(self, model: ServedModel, params: SamplingParams) -> OutputText:
        options = replace(self.text, min_tokens=params.min_tokens)
        if self.scanner is None:
            return PlainOutput(model.tokenizer, options)
        return ScannedOutput(model.tokenizer, options, self.scanner(), self.markers)


class Choice:
    """One answer to one prompt. `take` is called once per engine output and must stay cheap."""

    __slots__ = (
        "_call_reason",
        "_hides",
        "_is_plain",
        "_keeps_ids",
        "_observer",
        "_one_by_one",
        "_own_stops",
        "_text",
        "cached_tokens",
        "finish_reason",
        "first_s",
        "index",
        "last_s",
        "logprobs",
        "num_tokens",
        "preemptions",
        "prefill_s",
        "prompt",
        "prompt_logprobs",
        "reasoning_tokens",
        "started_s",
        "stop_reason",
        "stream",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        stream: Outputs,
        text: OutputText,
        request: GenerationRequest,
        observer: GenerationObserver,
        started_s: float,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.stream = stream
        self._text = text
        self._own_stops = request.stop_token_ids
        # So that tokens after a stop string are not counted, and each counts where it belongs.
        self._one_by_one = bool(request.text.stop) or request.scanner is not None
        self._is_plain = not self._one_by_one and not request.keeps_ids
        self._observer = observer
        self._keeps_ids = request.keeps_ids
        self._hides = request.hides_reasoning
        self._call_reason = request.call_reason
        self.started_s = started_s
        self.first_s = 0.0
        self.last_s = 0.0
        self.num_tokens = 0
        self.reasoning_tokens = 0
        self.prefill_s = 0.0
        self.preemptions = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.token_ids: list[int] = []  # not yet reported, if they are wanted
        self.logprobs: list[TokenLogprob] = []  # not yet reported
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    def reason(self, *, calls: bool) -> str | None:
        """Why it ended, as clients are told; `calls`: it has some."""
        return self._call_reason if calls and self.finish_reason == "stop" else self.finish_reason

    def take(self, output: EngineOutput) -> Sequence[Delta]:
        """What an output adds. Sets `finish_reason` when it was the last one."""
        if output.finish_reason == "error":
            raise engine_failure(output.error)
        if output.finish_reason == "abort":
            raise UnavailableError("The request was ended by the server.")
        tokens = output.token_ids
        self._observe(len(tokens), output)
        if self._is_plain and output.finish_reason is None:  # nearly every token of nearly every answer
            self.num_tokens += len(tokens)
            self.logprobs += output.logprobs
            return self._text.push(tokens)
        if self._one_by_one and len(tokens) > 1:
            return self._take_one_by_one(output)
        return self._take_tokens(tokens, output.logprobs, output)

    def _take_one_by_one(self, output: EngineOutput) -> Sequence[Delta]:
        deltas: list[Delta] = []
        last = len(output.token_ids) - 1
        for place, token in enumerate(output.token_ids):
            end = output if place == last else None
            deltas.extend(self._take_tokens((token,), output.logprobs[place : place + 1], end))
            if self.finish_reason is not None:
                break
        return deltas

    def _take_tokens(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], output: EngineOutput | None
    ) -> Sequence[Delta]:
        """`output` is what they are the last of."""
        reasons = self._text.reasons
        self.num_tokens += len(tokens)
        if not (reasons and self._hides):
            self.logprobs.extend(logprobs)
            if self._keeps_ids:
                self.token_ids.extend(tokens)
        if output is not None and output.finish_reason is not None:
            deltas = self._take_last(output, tokens)
        else:
            deltas = self._text.push(tokens)
            if self._text.stop_reason is not None:
                self._stop(self._text.stop_reason)
        if reasons and self._text.reasons:  # the tag that ends it is none of it
            self.reasoning_tokens += len(tokens)
        return [delta for delta in deltas if not isinstance(delta, Reasoning)] if self._hides else deltas

    def _take_last(self, output: EngineOutput, tokens: Sequence[int]) -> Sequence[Delta]:
        """The end that the engine found. An end token's text is only shown where stop strings are."""
        hidden = output.stop_token_id is not None and not self._text.shows_stop
        deltas = [*self._text.push(tokens[:-1] if hidden else tokens)]
        deltas.extend(self._text.finish(complete=output.finish_reason == "stop"))
        if self._text.stop_reason is not None:
            self._stop(self._text.stop_reason)
            return deltas
        self.finish_reason = output.finish_reason
        if output.stop_token_id in self._own_stops:
            self.stop_reason = output.stop_token_id
        return deltas

    def _stop(self, reason: str) -> None:
        self.finish_reason = "stop"
        self.stop_reason = reason

    def _observe(self, tokens: int, output: EngineOutput) -> None:
        now_s = perf_counter()
        if self.first_s:
            self._observer.generated(tokens, now_s - self.last_s)
        else:
            self.first_s = now_s
            self._observer.first_output(now_s - self.started_s, output.queue_s, output.prefill_s)
            self.prefill_s = output.prefill_s
            self._observer.generated(tokens, 0.0)
            self.cached_tokens = output.cached_tokens
            self.prompt_logprobs = output.prompt_logprobs
        self.preemptions += output.preemptions
        self.last_s = now_s

    def take_logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities since the last call."""
        taken, self.logprobs = self.logprobs, []
        return taken

    def take_token_ids(self) -> list[int]:
        """Token ids since the last call."""
        taken, self.token_ids = self.token_ids, []
        return taken

    async def run(self, emit: Emit) -> None:
        """Give everything to `emit` as it comes, to the end."""
        async for output in self.stream:
            deltas = self.take(output)
            await emit(self, deltas)
            if self.finish_reason is not None:
                return
        raise EngineError


@dataclass(slots=True)
class ToolCall:
    """One call, as far as it has come. `arguments` is JSON text."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """All deltas of a choice put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, deltas: Iterable[Delta]) -> Message:
        text, reasoning, calls, arguments = [], [], list[ToolCall](), list[list[str]]()
        for delta in deltas:
            match delta:
                case Text():
                    text.append(delta.text)
                case Reasoning():
                    reasoning.append(delta.text)
                case Call():
                    calls.append(ToolCall(delta.name))
                    arguments.append([])
                case Arguments():
                    arguments[delta.index].append(delta.text)
        for call, pieces in zip(calls, arguments, strict=True):
            call.arguments = "".join(pieces)
        return cls("".join(text), "".join(reasoning), calls)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. A prompt counts once, not once per choice."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    media_tokens: dict[str, int]  # by modality


@dataclass(slots=True)
class Generation:
    """All choices of one request, in the order of their index. Leaving the block ends what still runs."""

    request: GenerationRequest
    observer: GenerationObserver
    started_s: float  # when the request came, on perf_counter's clock
    media_tokens: dict[str, int]  # of the prompts, by modality
    choices: list[Choice] = field(default_factory=list)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for choice in self.choices:
            choice.stream.abort()
        unfinished = "error" if kind is not None and issubclass(kind, SensoriumError) else "abort"
        for choice in self.choices:
            self.observer.choice_ended(
                choice.finish_reason or unfinished,
                choice.num_tokens,
                prefill_s=choice.prefill_s,
                decode_s=choice.last_s - choice.first_s,
                preemptions=choice.preemptions,
            )
        lengths = [len(prompt.token_ids) for prompt, _ in self.request.prompts]
        count = self.request.choices
        starts = range(0, len(self.choices), count)
        longest = [max(choice.num_tokens for choice in self.choices[start : start + count]) for start in starts]
        self.observer.request_ended(lengths, self.cached_tokens, perf_counter() - self.started_s, longest)

    async def run(self, emit: Emit) -> None:
        if len(self.choices) == 1:
            await self.choices[0].run(emit)
            return
        # The first failure ends them all, and nothing may still be written after it.
        await all_in_order(choice.run(emit) for choice in self.choices)

    async def collect(self) -> list[Message]:
        """Every choice, whole."""
        pieces: list[list[Delta]] = [[] for _ in self.choices]

        async def keep(choice: Choice, deltas: Sequence[Delta]) -> None:
            pieces[choice.index].extend(deltas)

        await self.run(keep)
        return [Message.of(deltas) for deltas in pieces]

    @property
    def prompt_tokens(self) -> int:
        return self.request.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, each counted once: its first choice says what was found."""
        return sum(choice.cached_tokens for choice in self.choices[:: self.request.choices])

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def usage(self) -> Usage:
        return Usage(
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            sum(choice.reasoning_tokens for choice in self.choices),
            self.media_tokens,
        )


def generate(
    model: ServedModel, request: GenerationRequest, observer: GenerationObserver, *, started_s: float, turn: bytes = b""
) -> Generation:
    """Send one engine request per choice, prompt by prompt. `turn` says who takes turns with others."""
    generation = Generation(request, observer, started_s, _media_tokens(prompt for prompt, _ in request.prompts))
    with ExitStack() as undo:  # a client that is lost half way takes those with it that were sent
        undo.push(generation)
        for prompt, params in request.prompts:
            for own, stream in _sent(model, request, prompt, params, turn):
                text = request.output_text(model, own)
                index = len(generation.choices)
                generation.choices.append(Choice(index, prompt, stream, text, request, observer, started_s))
            observer.asked(request.choices, params.max_tokens)
        undo.pop_all()
    return generation


def _sent(
    model: ServedModel, request: GenerationRequest, prompt: Prompt, params: SamplingParams, turn: bytes
) -> Iterator[tuple[SamplingParams, Outputs]]:
    """The choices of a prompt, sent one after the other: how each is sampled, and what comes of it."""

    def ask(asked: Prompt, own: SamplingParams) -> OutputStream:
        return model.client.submit(
            EngineRequest(
                model.client.next_id(),
                asked,
                sampling=own,
                priority=request.priority,
                salt=request.salt,
                turn=turn,
                adapter=request.adapter,
            )
        )

    if request.beams is not None:
        for found in BeamSearch(request.beams, prompt, params, ask).streams:
            yield params, found
        return
    for number in range(request.choices):
        own = for_choice(params, number)
        yield own, ask(prompt, own)


def _media_tokens(prompts: Iterable[Prompt]) -> dict[str, int]:
    found: dict[str, int] = {}
    for prompt in prompts:
        for span in prompt.spans:
            kind = prompt.media[span.item].kind
            found[kind] = found.get(kind, 0) + span.length
    return found
