"""The sampling fields that chat and text completions share, and the one place that makes `SamplingParams` of them.

Null means the default: the checkpoint's `generation_config.json` where it says something sensible, else no effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.common import INT32_MAX, Body, Count, Name, Nested, Priority, TokenId
from sensorium.api.protocol.other_servers import ANSWERS, PENALTY_WINDOWS, Foreign
from sensorium.config import Limits
from sensorium.errors import RequestError
from sensorium.prompt.output import TextOptions
from sensorium.serving.defaults import MIN_REPETITION_PENALTY, ModelDefaults
from sensorium.serving.generation import GenerationRequest
from sensorium.types import Prompt, SamplingParams

MIN_TEMPERATURE = 0.01
_TOKEN_KEY = re.compile(r"-?[0-9]{1,10}")

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


class SamplingBody(Body):
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
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
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
        if len(stops) > limits.max_stop:
            raise RequestError(f"`stop` must have at most {limits.max_stop} entries.", param="stop")
        for stop in stops:
            if len(stop.encode()) > limits.max_stop_bytes:
                raise RequestError(f"A stop string must have at most {limits.max_stop_bytes} bytes.", param="stop")
        if len(self.logit_bias or ()) > limits.max_logit_bias:
            raise RequestError(f"`logit_bias` must have at most {limits.max_logit_bias} entries.", param="logit_bias")
        if self.stream_options is not None and not self.stream:
            raise RequestError("`stream_options` is only allowed together with `stream`: true.", param="stream_options")

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
        own_stops = tuple(self.stop_token_ids or ())
        for token in own_stops:
            _check_token(token, defaults.vocab_size, "stop_token_ids")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=_temperature(defaults.temperature if self.temperature is None else self.temperature),
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else max(0, self.top_k),
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=max(self.repetition_penalty or defaults.repetition_penalty, MIN_REPETITION_PENALTY),
            seed=None if self.seed == -1 else self.seed,
            stop_token_ids=tuple(dict.fromkeys((() if self.ignore_eos else defaults.stop_token_ids) + own_stops)),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=self._bias(defaults.vocab_size),
        )

    def _bias(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        pairs: list[tuple[int, float]] = []
        for key, bias in (self.logit_bias or {}).items():
            if not _TOKEN_KEY.fullmatch(key):
                raise RequestError("The keys of `logit_bias` must be token ids.", param="logit_bias")
            _check_token(int(key), vocab_size, "logit_bias")
            pairs.append((int(key), float(bias)))
        return tuple(pairs)


def _temperature(value: float) -> float:
    """Between greedy and 0.01 logits overflow without changing the choice. (Very small penalties do the same.)"""
    return MIN_TEMPERATURE if 0.0 < value < MIN_TEMPERATURE else value


def _check_token(token: int, vocab_size: int, param: str) -> None:
    if not 0 <= token < vocab_size:
        raise RequestError(
            f"`{param}` names token {token}, but the vocabulary has ids 0 to {vocab_size - 1}.", param=param
        )
