"""The form of POST /v1/audio/transcriptions and /translations, and what its fields ask the model to do.

A form's values are text, so numbers and truth values are read from it here; bounds are those of chats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from sensorium.api.protocol.common import Body, Name, UnknownFields
from sensorium.api.protocol.languages import language_name
from sensorium.api.protocol.other_servers import RECORDINGS, Foreign
from sensorium.api.protocol.sampling import SamplingBody
from sensorium.api.protocol.validation import request_error
from sensorium.errors import RequestError, UnsupportedFieldError
from sensorium.serving.defaults import ModelDefaults, completion_length
from sensorium.types import INT32_MAX, SamplingParams

TRANSCRIBE = "Write down what is said in this recording, word for word, and nothing else."
TRANSLATE = "Write down in {language} what is said in this recording, and nothing else."
SPOKEN = "It is spoken in {language}."
CONTEXT = "What comes before it: {prompt}"
HOTWORDS = "Words that may occur in it: {hotwords}"
"""Models that chat about audio have no other way to be told than in words."""
THRESHOLDS = ("logprob_threshold", "compression_ratio_threshold", "no_speech_threshold")


def _language(text: str) -> str | None:
    """A language that we know; None where it is left to the model."""
    if text.lower() == "auto":
        return None
    if language_name(text) is None:
        raise PydanticCustomError("own", "must be a code of ISO 639-1, such as en, or a language's English name")
    return text


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Granularities = Annotated[list[Literal["segment", "word"]], Field(max_length=8), BeforeValidator(_listed)]
Language = Annotated[str, Field(min_length=1, max_length=32), AfterValidator(_language)]


class AudioRequest(Body):
    """Every field of the form but the file."""

    model_config = ConfigDict(strict=False)  # the rest is Body's
    foreign: ClassVar[Mapping[str, Foreign]] = RECORDINGS

    model: Name | None = None
    language: Language | None = None
    to_language: Language | None = None
    prompt: Annotated[str, Field(max_length=8192)] | None = None
    hotwords: Annotated[str, Field(max_length=8192)] | None = None
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] | None = None
    timestamp_granularities: Granularities | None = None
    logprob_threshold: Annotated[float, Field(ge=-1000, le=0)] | None = None
    compression_ratio_threshold: Annotated[float, Field(ge=0, le=1000)] | None = None
    no_speech_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_include_usage: bool | None = None
    stream_continuous_usage_stats: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None

    def check(self) -> None:
        if self.stream and self.response_format not in (None, "json", "text"):
            raise RequestError(f"`{self.response_format}` cannot be streamed.", param="response_format")
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise RequestError(
                "Times are told with `response_format` verbose_json (and in srt and vtt, of segments).",
                param="timestamp_granularities",
            )

    def check_for_chat(self) -> None:
        """What models that chat about a recording cannot do."""
        if self.response_format in ("srt", "vtt"):
            raise UnsupportedFieldError(
                "`response_format` must be json, text or verbose_json: this model tells no times.",
                param="response_format",
            )
        for name in (*THRESHOLDS, "timestamp_granularities"):
            if getattr(self, name) not in (None, []):
                raise UnsupportedFieldError(f"Only models that transcribe have `{name}`: leave it out.", param=name)

    @property
    def granularities(self) -> frozenset[str]:
        return frozenset(self.timestamp_granularities or ("segment",))

    def sampling(
        self, defaults: ModelDefaults, prompt_tokens: int, param: str, *, is_open: bool = False
    ) -> SamplingParams:
        """Greedy unless the request says otherwise. `param` is the field that makes the prompt long; `is_open`: the
        completion may be as long as the context, whatever the checkpoint says of chats."""
        body = SamplingBody(
            temperature=0.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
        )
        default = None if is_open else defaults.max_new_tokens
        max_tokens = completion_length(defaults, prompt_tokens, self.max_completion_tokens, default, 1, param)
        return body.sampling_with(defaults, max_tokens=max_tokens, logprobs=None)

    def context(self) -> str:
        """What comes before the recording and which words may be in it, for a model that has a place for that."""
        return " ".join(text.strip() for text in (self.hotwords, self.prompt) if text)

    def instruction(self, *, translates: bool) -> str:
        """What the model is told beside the recording."""
        lines = [TRANSLATE.format(language=language_name(self.to_language or "en")) if translates else TRANSCRIBE]
        if self.language:
            lines.append(SPOKEN.format(language=language_name(self.language)))
        if self.prompt:
            lines.append(CONTEXT.format(prompt=self.prompt))
        if self.hotwords:
            lines.append(HOTWORDS.format(hotwords=self.hotwords))
        return "\n".join(lines)


def parse_fields(fields: Mapping[str, list[str]], unknown: UnknownFields) -> AudioRequest:
    """The request that a form's fields describe. A field that is empty counts as left out."""
    values: dict[str, Any] = {}
    for name, given in fields.items():
        if name.endswith("[]"):
            values[name.removesuffix("[]")] = [one for one in given if one]
        elif len(given) > 1:
            raise RequestError(f"`{name}` is given twice.", param=name)
        elif given[0]:
            values[name] = given[0]
    if values.get("response_format") == "diarized_json":
        raise UnsupportedFieldError(
            "`response_format` must be json, text, srt, vtt or verbose_json: models here do not tell speakers apart.",
            param="response_format",
        )
    try:
        request = AudioRequest.model_validate(values)
    except ValidationError as error:
        raise request_error(error) from None
    request.check_fields(unknown)
    request.check()
    return request
