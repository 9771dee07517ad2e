"""What a request leaves open: a model's sampling defaults, the length of completions, the seeds of choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.errors import ContextLengthError, RequestError
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import INT32_MAX, SamplingParams

MIN_REPETITION_PENALTY = 0.001


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What a model brings to sampling: its defaults, its end tokens and its bounds."""

    max_model_len: int
    vocab_size: int
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None  # of answers whose length is left open; None: the rest of the context
    max_logprobs: int = 20  # alternatives that are reported beside a token
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(
        cls,
        generation: Mapping[str, Any],
        *,
        max_model_len: int,
        vocab_size: int,
        stop_token_ids: tuple[int, ...],
        max_logprobs: int = 20,
        tokenizer: Tokenizer | None = None,
    ) -> ModelDefaults:
        """Defaults from `generation_config.json`; what is out of bounds there counts as not said."""
        return cls(
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            stop_token_ids=stop_token_ids,
            temperature=_number(generation, "temperature", 0.0, 2.0, 1.0),
            top_p=_number(generation, "top_p", 1e-6, 1.0, 1.0),
            top_k=int(_number(generation, "top_k", 0, INT32_MAX, 0)),
            min_p=_number(generation, "min_p", 0.0, 1.0, 0.0),
            repetition_penalty=_number(generation, "repetition_penalty", MIN_REPETITION_PENALTY, 100.0, 1.0),
            max_new_tokens=int(_number(generation, "max_new_tokens", 1, INT32_MAX, 0)) or None,
            max_logprobs=max_logprobs,
            tokenizer=tokenizer,
        )

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words that are not to be said: as a text begins with each, and after a space."""
        if self.tokenizer is None:
            return ()
        forms = [form for word in words for form in dict.fromkeys((word, word.lstrip(), " " + word.lstrip())) if form]
        found = (
            tuple(self.tokenizer.encode(self.tokenizer.sanitize(form)))
            for form in forms
            if form.strip() or form in words
        )
        return tuple(dict.fromkeys(one for one in found if one and max(one) < self.vocab_size))

    def alternatives(self, wanted: int, param: str) -> int:
        """How many alternatives beside each token are reported; -1 is the whole vocabulary. RequestError beyond the
        operator's limit."""
        if wanted == -1 and self.vocab_size > self.max_logprobs:
            raise RequestError(
                f"`{param}`: -1 asks for all {self.vocab_size} tokens of the vocabulary, but this server reports at "
                f"most {self.max_logprobs} (the operator can allow more with --max-logprobs).",
                param=param,
            )
        return self.vocab_size if wanted == -1 else wanted


def _number(generation: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = generation.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return default
    return float(value)


def completion_length(
    defaults: ModelDefaults, prompt_tokens: int, wanted: int | None, default: int | None, choices: int, param: str
) -> int:
    """How many tokens each of `choices` completions may have. `default` None is the rest of the context.

    All completions of a prompt together may be as long as four contexts: a larger `n` x length asks for work that
    nobody waits for. An explicit length that does not fit is refused, a default one is made to fit.
    """
    context = defaults.max_model_len
    rest = context - prompt_tokens
    if rest < 1:
        raise ContextLengthError(
            f"The prompt has {prompt_tokens} tokens, but the model's context is {context} tokens, "
            "of which at least one is for the answer. Shorten the prompt.",
            param=param,
        )
    most = max(1, 4 * context // choices)
    if wanted is None:
        return min(rest, most) if default is None else min(rest, most, default)
    if wanted > rest:
        raise ContextLengthError(
            f"The prompt has {prompt_tokens} tokens and the answer may have {wanted}, together "
            f"{prompt_tokens + wanted}, but the model's context is {context} tokens. Shorten the "
            "prompt or lower `max_tokens`.",
            param=param,
        )
    if wanted > most:
        raise RequestError(
            f"`n` x `max_tokens` is {choices * wanted} tokens; at most {4 * context} can be asked for at once.",
            param="n",
        )
    return wanted


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """Each of `n` choices draws its own random numbers, also from one seed."""
    if index == 0 or params.seed is None:
        return params
    return dataclasses.replace(params, seed=(params.seed + index + 2**63) % 2**64 - 2**63)
