"""Grammars of llguidance in tests: does one let a text pass, and what does it let a model write that knows nothing?"""

from __future__ import annotations

import random
from collections.abc import Iterable

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


class GrammarBench:
    """A vocabulary of single bytes, these special tokens and an end token."""

    def __init__(self, special: Iterable[str] = ()) -> None:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        self._raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
        self._raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._raw.decoder = decoders.ByteLevel()
        words = list(special)
        self._raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ["<eos>", *words]])
        self._end = self._id("<eos>")
        self.tokens: dict[str, int] = {word: self._id(word) for word in words}
        self._tokenizer = LLTokenizer(self._raw.to_str(), eos_token=self._end)

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether a whole answer may be this text."""
        matcher = self._matcher(grammar)
        ids = self._raw.encode(text).ids
        return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())

    def allows(self, grammar: str, beginning: str) -> bool:
        """Whether an answer may begin so."""
        ids = self._raw.encode(beginning).ids
        return bool(self._matcher(grammar).try_consume_tokens(ids) == len(ids))

    def sampled(self, grammar: str, seed: int, longest: int = 250) -> str | None:
        """An answer by chance, drawn to ends and brackets; None if it is not over in so many tokens."""
        matcher, draw = self._matcher(grammar), random.Random(seed)
        ids: list[int] = []
        while not matcher.is_stopped() and len(ids) < longest:
            bits = matcher.compute_bitmask()
            allowed = [one for one in range(self._raw.get_vocab_size()) if bits[one // 8] >> (one % 8) & 1]
            chosen = draw.choices(allowed, [self._weight(one) for one in allowed])[0]
            if chosen == self._end:
                break
            assert matcher.consume_token(chosen), matcher.get_error()
            ids.append(chosen)
        assert not matcher.is_error(), matcher.get_error()
        return self._raw.decode(ids, skip_special_tokens=False) if len(ids) < longest else None

    def _id(self, word: str) -> int:
        found = self._raw.token_to_id(word)
        assert found is not None
        return found

    def _weight(self, token: int) -> float:
        if token == self._end or token in self.tokens.values():
            return 30
        text = self._raw.id_to_token(token) or ""
        return 8 if text in '"},])<|' else 1 if text.isascii() else 0.05

    def _matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar)
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
        return matcher
