"""The form that a request asks its answer to have, as it came, and how much of one may come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sensorium.errors import GrammarError

FormKind = Literal["json", "regex", "choice", "lark", "grammar"]
MAX_CHARS: dict[FormKind, int] = {
    "json": 256 * 1024,
    "regex": 64 * 1024,
    "choice": 128 * 1024,
    "lark": 128 * 1024,
    "grammar": 128 * 1024,
}
MAX_WHITESPACE_CHARS = 256
WHITESPACE = "\\n {0,16}| "
"""Between the tokens of JSON: a space, or a line break and some indentation. Models lose themselves in more."""


@dataclass(frozen=True, slots=True)
class Form:
    """`kind` "json" is a JSON schema and "choice" an array of strings, both as JSON text; "grammar" is Lark or GBNF.

    `param` is the field that it came in. `whitespace` is a regular expression for what stands between the tokens of
    JSON, "" for nothing; `closed`: objects have no other properties than those named.
    """

    kind: FormKind
    source: str
    param: str
    whitespace: str = WHITESPACE
    closed: bool = False

    def check_size(self) -> None:
        """GrammarError if it is longer than any that is compiled."""
        most = MAX_CHARS[self.kind]
        if len(self.source) > most:
            raise GrammarError(f"`{self.param}` must have at most {most} characters.", param=self.param)
        if len(self.whitespace) > MAX_WHITESPACE_CHARS:
            raise GrammarError(
                f"A whitespace pattern must have at most {MAX_WHITESPACE_CHARS} characters.", param=self.param
            )
