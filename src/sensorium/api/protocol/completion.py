"""The body of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.common import Count, Text, TokenId
from sensorium.api.protocol.other_servers import COMPLETIONS, Foreign
from sensorium.api.protocol.sampling import (
    LogprobCount,
    SamplingBody,
    check_alternatives,
    check_answer_size,
    check_prompt_size,
)
from sensorium.config import Limits
from sensorium.errors import RequestError
from sensorium.serving.defaults import ModelDefaults, completion_length
from sensorium.types import SamplingParams

MAX_PROMPTS = 1024
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
    logprobs: LogprobCount | None = None

    def check(self, limits: Limits) -> None:
        self.check_limits(limits)
        check_alternatives(self.logprobs, limits, "logprobs")
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
    def length(self) -> int | None:
        """Tokens that the engine computes for each choice, where the request says it."""
        return 1 if self.max_tokens == 0 else self.max_tokens

    @property
    def generates(self) -> bool:
        """`max_tokens` 0 only scores the prompt."""
        return self.max_tokens != 0

    def sampling(self, defaults: ModelDefaults, prompt_tokens: int) -> SamplingParams:
        logprobs = None if self.logprobs is None else defaults.alternatives(self.logprobs, "logprobs")
        scored = [self.scored(defaults, prompt_tokens)]
        if self.echo and logprobs is not None:
            check_prompt_size(logprobs, prompt_tokens, "logprobs")
            scored.append(logprobs)
        max_tokens = completion_length(defaults, prompt_tokens, self.length, DEFAULT_MAX_TOKENS, self.choices, "prompt")
        check_answer_size(logprobs, max_tokens * self.choices, "logprobs")
        return self.sampling_with(
            defaults,
            logprobs=logprobs,
            prompt_logprobs=max((one for one in scored if one is not None), default=None),
            max_tokens=max_tokens,
        )
