"""What fits into a model's context, and the errors that say what does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from sensorium.errors import PromptTooLongError, RequestError
from sensorium.prompt.encode import Side, Truncation
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Modality, Prompt

LONG_TEXT = 1 << 20  # characters from which a text may be refused by its length alone


class ContextLimit:
    """Tokens of prompt and completion together. `max_model_len` is asked each time: the engine may lower it when it
    has loaded. `cuts_left`: prompts that are cut lose their beginning unless the request says otherwise. `name`: what
    the limit is of, for errors; `raised_by`: how an operator has longer prompts taken."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: Callable[[], int],
        *,
        cuts_left: bool,
        name: str = "This model's context",
        raised_by: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._cuts_left = cuts_left
        self._name = name
        self._advice = f" {raised_by}" if raised_by else ""

    @property
    def max_model_len(self) -> int:
        return self._max_model_len()

    def truncation(self, wanted: int | None, side: Side | None, *, completion: int | None = None) -> Truncation | None:
        """What a request's `truncate_prompt_tokens` means here: -1 is as many as the model takes, beside the tokens of
        a completion if one follows (`completion`; its prompt loses its beginning unless the request says otherwise)."""
        if wanted is None:
            return None
        if wanted > self.max_model_len:
            raise RequestError(
                f"`truncate_prompt_tokens` is {wanted}, more than this model's context of {self.max_model_len} tokens.",
                param="truncate_prompt_tokens",
            )
        default: Side = "left" if self._cuts_left or completion is not None else "right"
        most = max(1, self.max_model_len - (completion or 0))
        return Truncation(most if wanted == -1 else wanted, side or default)

    def check_text(self, text: str, param: str) -> None:
        """Refuse what cannot fit however well it is tokenized: tokenizing ten million characters takes seconds."""
        if len(text) > LONG_TEXT and (fewest := self._tokenizer.fewest_tokens(text)) > self.max_model_len:
            raise PromptTooLongError(
                f"{self._name} is {self.max_model_len} tokens; the text alone, with "
                f"{len(text)} characters, is at least {fewest}. Shorten it.{self._advice}",
                param=param,
            )

    def check(self, prompt: Prompt, param: str) -> None:
        if len(prompt.token_ids) <= self.max_model_len:
            return
        media = [
            (one.kind, sum(span.length for span in prompt.spans if span.item == item))
            for item, one in enumerate(prompt.media)
        ]
        text_tokens = len(prompt.token_ids) - sum(count for _, count in media)
        raise self.too_long(text_tokens, media, param)

    def too_long(self, text_tokens: int, media: Sequence[tuple[Modality, int]], param: str) -> PromptTooLongError:
        seen: Counter[Modality] = Counter()
        parts = [f"text {text_tokens}"]
        for kind, count in media:
            seen[kind] += 1
            parts.append(f"{kind} {seen[kind]} {count}")
        total = text_tokens + sum(count for _, count in media)
        advice = "Shorten it or send fewer or smaller media." if media else "Shorten it."
        return PromptTooLongError(
            f"{self._name} is {self.max_model_len} tokens, but the prompt has {total}: "
            f"{', '.join(parts)}. {advice}{self._advice}",
            param=param,
        )
