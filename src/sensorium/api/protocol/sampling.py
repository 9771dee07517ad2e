"""The sampling fields that chat and text completions share, and the one place that makes `SamplingParams` of them.

Null means the default: the checkpoint's `generation_config.json` where it says something sensible, else no effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.common import Count, Name, Nested, Priority, TokenId
from sensorium.api.protocol.other_servers import ANSWERS, PENALTY_WINDOWS, Foreign
from sensorium.api.protocol.structured import StructuredBody
from sensorium.config import Limits
from sensorium.errors import RequestError
from sensorium.prompt.output import TextOptions
from sensorium.serving.beams import Beams
from sensorium.serving.defaults import MIN_REPETITION_PENALTY, ModelDefaults
from sensorium.serving.generation import GenerationRequest
from sensorium.types import INT32_MAX, Prompt, SamplingParams

MAX_LOGPROBS = 500_000
"""Log-probabilities of prompt tokens that one answer may carry: each is an object in memory and in JSON."""
FEW_ALTERNATIVES = 128  # that an answer of any length may have
MANY_STOPS = 16  # strings that APIs take at least whose clients send more than four
_TOKEN_KEY = re.compile(r"-?[0-9]{1,10}")

LogprobCount = Annotated[int, Field(ge=-1, le=INT32_MAX)]
"""-1 is the whole vocabulary, where the operator lets requests ask for as much."""
Stop = Annotated[str, Field(min_length=1, max_length=4096)]


def _one_or_many(value: Any) -> str:
    return "<many>" if isinstance(value, list) else "<one>"


StopField = Annotated[
    Annotated[Stop, Tag("<one>")] | Annotated[list[Stop], Field(max_length=64), Tag("<many>")],
    Discriminator(_one_or_many),
]


class StreamOptions(Nested):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # figures in every event, if there are to be any


class SamplingBody(StructuredBody):
    """Fields of both completion endpoints. Bounds here are absolute; `Limits` narrows them further."""

    foreign: ClassVar[Mapping[str, Foreign]] = ANSWERS

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    random_seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None  # Mistral's clients have no other
    stop: StopField | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(max_length=16)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=4096)
        ]
        | None
    ) = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=2**16)] | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=256)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    prompt_logprobs: LogprobCount | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    use_beam_search: bool | None = None  # `n` answers are searched for together
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Priority | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None

    def changes_nothing(self, name: str, value: Any) -> bool:
        if name in PENALTY_WINDOWS and not self.penalizes:
            return True
        return super().changes_nothing(name, value)

    @property
    def penalizes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty not in (None, 1.0)

    def check_limits(self, limits: Limits) -> None:
        """Everything that can be refused before a prompt is made, with the operator's limits."""
        if self.choices > limits.max_n:
            raise RequestError(f"`n` must be at most {limits.max_n}.", param="n")
        stops = self.stop_strings
        check_stop_count(stops, limits, "stop")
        for stop in stops:
            if len(stop.encode()) > limits.max_stop_bytes:
                raise RequestError(f"A stop string must have at most {limits.max_stop_bytes} bytes.", param="stop")
        if len(self.logit_bias or ()) > limits.max_logit_bias:
            raise RequestError(f"`logit_bias` must have at most {limits.max_logit_bias} entries.", param="logit_bias")
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "`truncate_prompt_tokens` must be at least 1, or -1 for as many as the model takes.",
                param="truncate_prompt_tokens",
            )
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError(
                "`prompt_logprobs` is not allowed together with `stream`: true.", param="prompt_logprobs"
            )
        check_alternatives(self.prompt_logprobs, limits, "prompt_logprobs")
        if (form := self.form()) is not None and self.allowed_token_ids:
            raise RequestError(f"`{form.param}` and `allowed_token_ids` exclude each other.", param="allowed_token_ids")
        self._check_beams()
        if self.stream_options is not None and not self.stream:
            raise RequestError("`stream_options` is only allowed together with `stream`: true.", param="stream_options")

    def _check_beams(self) -> None:
        if not self.use_beam_search:
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) not in (None, 1, False):
                    raise RequestError(f"`{name}` needs `use_beam_search`: true.", param=name)
            return
        for name in ("logit_bias", "bad_words", "allowed_token_ids", "logprob_token_ids"):
            if getattr(self, name):
                raise RequestError(f"`{name}` and `use_beam_search` exclude each other.", param=name)
        if self.penalizes:
            raise RequestError("Penalties and `use_beam_search` exclude each other.", param="use_beam_search")

    @property
    def beams(self) -> Beams | None:
        """How to search for the choices together; None where each is sampled alone."""
        if not self.use_beam_search:
            return None
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        return Beams(self.choices, penalty, self.early_stopping or False)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def runs_usage(self) -> bool:
        return (
            self.includes_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    def keeps_special_tokens(self) -> bool:
        return self.skip_special_tokens is False

    def generation(
        self, prompts: tuple[tuple[Prompt, SamplingParams], ...], salt: bytes, *, continues: bool
    ) -> GenerationRequest:
        """What is sent to the engine for these prompts. `continues`: answers go on in the middle of a text."""
        return GenerationRequest(
            prompts,
            TextOptions(
                stop=self.stop_strings,
                include_stop=bool(self.include_stop_str_in_output),
                skip_special_tokens=not self.keeps_special_tokens,
                continues=continues,
            ),
            choices=self.choices,
            salt=salt,
            priority=self.priority or 0,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            keeps_ids=bool(self.return_token_ids),
            beams=self.beams,
        )

    def sampling_with(
        self, defaults: ModelDefaults, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The project's own type, every default resolved and every id checked against the vocabulary."""
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise RequestError(
                f"`min_tokens` ({min_tokens}) must not be greater than the tokens that may be "
                f"generated ({max_tokens}).",
                param="min_tokens",
            )
        if self.logprob_token_ids and logprobs is None:
            raise RequestError("`logprob_token_ids` needs `logprobs`.", param="logprob_token_ids")
        own_stops = tuple(self.stop_token_ids or ())
        for token in own_stops:
            _check_token(token, defaults.vocab_size, "stop_token_ids")
        stop_token_ids = tuple(dict.fromkeys((() if self.ignore_eos else defaults.stop_token_ids) + own_stops))
        bad_words = defaults.bad_words(self.bad_words or ())
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else max(0, self.top_k),
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=max(self.repetition_penalty or defaults.repetition_penalty, MIN_REPETITION_PENALTY),
            seed=self._seed,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=self._bias(defaults.vocab_size),
            logprob_token_ids=self._ids("logprob_token_ids", defaults.vocab_size),
            allowed_token_ids=self._allowed(defaults, bad_words, stop_token_ids if min_tokens else ()),
            bad_words=bad_words,
        )

    @property
    def _seed(self) -> int | None:
        seed = self.random_seed if self.seed is None else self.seed
        return None if seed == -1 else seed

    def scored(self, defaults: ModelDefaults, prompt_tokens: int) -> int | None:
        """Alternatives to be reported beside each token of the prompt; None: nothing."""
        if self.prompt_logprobs is None:
            return None
        count = defaults.alternatives(self.prompt_logprobs, "prompt_logprobs")
        check_prompt_size(count, prompt_tokens, "prompt_logprobs")
        return count

    def _ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A field's token ids, each once."""
        ids = tuple(dict.fromkeys(getattr(self, name) or ()))
        for token in ids:
            _check_token(token, vocab_size, name)
        return ids

    def _allowed(
        self, defaults: ModelDefaults, bad_words: Sequence[tuple[int, ...]], late: Sequence[int]
    ) -> tuple[int, ...]:
        """What may be said; `late` not from the start. RequestError if that is nothing."""
        allowed = self._ids("allowed_token_ids", defaults.vocab_size)
        if allowed and not set(allowed).difference(late, (word[0] for word in bad_words if len(word) == 1)):
            raise RequestError(
                "`allowed_token_ids` leaves nothing to say: all of them are `bad_words`, or end tokens, which "
                "`min_tokens` keeps back.",
                param="allowed_token_ids",
            )
        return allowed

    def _bias(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        pairs: list[tuple[int, float]] = []
        for key, bias in (self.logit_bias or {}).items():
            if not _TOKEN_KEY.fullmatch(key):
                raise RequestError("The keys of `logit_bias` must be token ids.", param="logit_bias")
            _check_token(int(key), vocab_size, "logit_bias")
            pairs.append((int(key), float(bias)))
        return tuple(pairs)


def check_stop_count(stops: Sequence[str], limits: Limits, param: str, least: int = 0) -> None:
    """RequestError for more stop strings than the operator allows, or `least` where an API has always more."""
    most = max(limits.max_stop, least)
    if len(stops) > most:
        raise RequestError(
            f"`{param}` must have at most {most} entries (the operator can allow more with --max-stop).", param=param
        )


def check_alternatives(count: int | None, limits: Limits, param: str) -> None:
    if (count or 0) > limits.max_logprobs:
        raise RequestError(
            f"`{param}` must be at most {limits.max_logprobs} (the operator can allow more with --max-logprobs).",
            param=param,
        )


def check_answer_size(alternatives: int | None, tokens: int, param: str) -> None:
    """Many alternatives are for few tokens."""
    if (alternatives or 0) > FEW_ALTERNATIVES and (alternatives or 0) * tokens > MAX_LOGPROBS:
        raise RequestError(
            f"{alternatives} alternatives (`{param}`) beside each of {tokens} tokens are more than the "
            f"{MAX_LOGPROBS} that one answer may have: lower `max_tokens`.",
            param=param,
        )


def check_prompt_size(alternatives: int, tokens: int, param: str) -> None:
    if (alternatives + 1) * tokens > MAX_LOGPROBS:
        raise RequestError(f"`{param}` x prompt tokens must be at most {MAX_LOGPROBS}.", param=param)


def _check_token(token: int, vocab_size: int, param: str) -> None:
    if not 0 <= token < vocab_size:
        raise RequestError(
            f"`{param}` names token {token}, but the vocabulary has ids 0 to {vocab_size - 1}.", param=param
        )
