"""Keeps control tokens out of other people's text: `<|im_end|>` typed by a user stays eight letters.

`escape` puts a mark inside every literal in untrusted text, so that the text can go through a chat template without
being taken for the template's own control tokens. Whoever tokenizes the result calls `rename_true`.
Marks are Unicode noncharacters, which text is not allowed to contain: foreign ones become U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

MARK = "\ufdd0"  # stands after the first character of a literal that is only text
NAME = "\ufdd1"  # begins the name of a token in `tokenizer`'s second vocabulary
CUT = "\ufdd2"  # where `template` cuts a message that is to be continued
_FOREIGN_MARKS = re.compile(f"[{MARK}{NAME}{CUT}]")


def sanitize(text: str) -> str:
    """Untrusted text without our marks."""
    return _FOREIGN_MARKS.sub("\ufffd", text) if not text.isascii() else text


class Literals:
    """A set of literals that untrusted text must not contain."""

    def __init__(self, literals: Iterable[str]) -> None:
        self.all = frozenset(literals) - {""}
        pattern = alternatives(self.all)
        self._first_of_any = re.compile(f"(?={pattern}).", re.DOTALL)
        self._heads = frozenset(literal[:end] for literal in self.all for end in range(1, len(literal)))
        self._longest_head = max(map(len, self._heads), default=0)

    def escape(self, text: str) -> str:
        text = sanitize(text)
        if not self.all:
            return text
        escaped = self._first_of_any.sub(rf"\g<0>{MARK}", text)
        # A literal must not arise where this text meets the next one either.
        return escaped + MARK if self._ends_in_head(text) else escaped

    def _ends_in_head(self, text: str) -> bool:
        return any(text[-length:] in self._heads for length in range(1, min(self._longest_head, len(text)) + 1))


def alternatives(literals: Iterable[str]) -> str:
    """A pattern that matches any of the literals, the longest first, and none that a mark declares to be text.

    Literals are grouped by first character, because the regex engine then skips text where none of these occurs.
    """
    groups: dict[str, list[str]] = {}
    for literal in sorted(literals, key=len, reverse=True):
        groups.setdefault(literal[0], []).append(literal[1:])
    branches = (re.escape(first) + _any_rest(rests) for first, rests in groups.items())
    return "(?:" + "|".join(branches) + ")" if groups else "(?!)"


def _any_rest(rests: list[str]) -> str:
    # A literal of one character has no room for a mark inside: there it stands behind.
    return "(?:" + "|".join(re.escape(rest) if rest else f"(?!{MARK})" for rest in rests) + ")"


def rename_true(text: str, pattern: re.Pattern[str], name: Callable[[str], str]) -> str:
    """Give every unmarked literal the name that `name` says and take the marks out of the others."""
    return pattern.sub(lambda match: name(match.group()), text).replace(MARK, "")


def escape_deep(value: object, escape: Callable[[str], str]) -> object:
    """`escape` for every string, keys included, of a JSON value."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {escape_deep(key, escape): escape_deep(item, escape) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape_deep(item, escape) for item in value]
    return value
