"""Models with a prompt of their own for recordings that are to be written down, and what their completions say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class Transcript:
    """A completion on its way to a client. `language` is a code, or what the model calls it; None: nobody has said."""

    def __init__(self, language: str | None) -> None:
        self.language = language

    def push(self, text: str) -> str:
        """More of the completion -> what of it may be shown by now."""
        return text

    def finish(self) -> str:
        """What was held back and is shown after all."""
        return ""

    def whole(self, completion: str) -> str:
        """What a completion that is there says. `language` is known then."""
        return completion.strip()


class Transcriber:
    """Mixed into such a model's processor."""

    takes_recordings: ClassVar[bool] = True
    spoken: ClassVar[Iterable[str]] = ()  # codes of the languages that it can be told; empty: it takes any
    takes_context: ClassVar[bool] = True  # whether it is told what comes before a recording, or which words it has
    translates: ClassVar[bool] = False  # whether it translates when it is asked to in words

    @property
    def transcribes(self) -> bool:
        """Whether this checkpoint has the tokens for it."""
        return True

    def transcription(self, language: str | None, context: str) -> str:
        """The prompt of a recording as text, in which special tokens are tokens. `language` is a code."""
        raise NotImplementedError

    def transcript(self, language: str | None) -> Transcript:
        return Transcript(language)
