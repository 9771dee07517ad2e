"""The body of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.common import Count, Text, TokenId
from sensorium.api.protocol.other_servers import COMPLETIONS, Foreign
from sensorium.api.protocol.sampling import SamplingBody
from sensorium.config import Limits
from sensorium.errors import RequestError
from sensorium.serving.defaults import ModelDefaults, completion_length
from sensorium.types import SamplingParams

MAX_PROMPTS = 1024
MAX_PROMPT_LOGPROBS = 500_000
"""Log-probabilities of prompt tokens that one answer may carry: each is an object in memory and in JSON."""
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**22)]


def _prompt_form(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else None
    if isinstance(first, list):
        return "<many ids>"
    return "<texts>" if first is None or isinstance(first, str) else "<ids>"


PromptField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<many ids>")],
    Discriminator(_prompt_form),
]


class CompletionRequest(SamplingBody):
    foreign: ClassVar[Mapping[str, Foreign]] = COMPLETIONS

    prompt: PromptField
    max_tokens: Count | None = None
    logprobs: Count | None = None

    def check(self, limits: Limits) -> None:
        self.check_limits(limits)
        if (self.logprobs or 0) > limits.max_logprobs:
            raise RequestError(f"`logprobs` must be at most {limits.max_logprobs}.", param="logprobs")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("`max_tokens` must be at least 1, or 0 together with `echo`.", param="max_tokens")
        if len(self.prompts) * self.choices > MAX_PROMPTS:
            raise RequestError(f"Prompts x `n` must be at most {MAX_PROMPTS}.", param="n")
        if any(not prompt for prompt in self.prompts):
            raise RequestError("`prompt` must not be empty.", param="prompt")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        many: list[str] | list[list[int]] = prompt
        return many

    @property
    def generates(self) -> bool:
        """`max_tokens` 0 only scores the prompt."""
        return self.max_tokens != 0

    def sampling(self, defaults: ModelDefaults, prompt_tokens: int) -> SamplingParams:
        scored = self.logprobs if self.echo else None
        if scored is not None and (scored + 1) * prompt_tokens > MAX_PROMPT_LOGPROBS:
            raise RequestError(f"`logprobs` x prompt tokens must be at most {MAX_PROMPT_LOGPROBS}.", param="logprobs")
        wanted = 1 if self.max_tokens == 0 else self.max_tokens
        return self.sampling_with(
            defaults,
            logprobs=self.logprobs,
            prompt_logprobs=scored,
            max_tokens=completion_length(defaults, prompt_tokens, wanted, DEFAULT_MAX_TOKENS, self.choices, "prompt"),
        )
