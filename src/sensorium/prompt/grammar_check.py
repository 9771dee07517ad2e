"""From the form that a request asks for to a grammar that compiles: the part that may take long or never return.

Runs in a disposable process (`grammar_worker`): the compiler's stack can be overrun by rules or references that follow
one another by the thousand, and converting a grammar takes what time it takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import process_time
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from sensorium.prompt.forms import Form
from sensorium.prompt.schema import SchemaRefused, ready
from sensorium.prompt.schema_faults import fault_of

LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    max_lexer_states=50_000,
    max_items_in_row=16_000,
    verbose_errors=False,
)
"""Below the engine's, which has the same work to do with more tokens."""
INTERSECTIONS = "intersection stack level exceeded"
"""What the compiler says of schemas that hold at once and of which two refer to themselves."""
COMPILING = "failed to compile JSON schema: "
"""Stands, behind a place in the whole grammar, before what it says of a schema in it."""
MAX_REASON_CHARS = 200
LOCATING_S = 1.0
"""Processor time for the search for what is wrong in a schema."""
NOTHING_FITS = "cannot be fulfilled: no answer fits it"
BAD_REGEX = "has a regular expression that cannot be used"
_TOO_COMPLEX = ("too big", "too large", "fuel", "too many", "too complex", "max is", "regex is empty", INTERSECTIONS)
NUM_BYTES = 256


@dataclass(frozen=True, slots=True)
class Names:
    """The tokens of a model that a grammar may name as `<text>` or by their ids."""

    texts: Sequence[str] = ()
    vocab_size: int = 0


class FormRefused(Exception):
    """`path` is where in the field; `reason` completes a sentence."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


def checked(form: Form, names: Names) -> tuple[str, str]:
    """(kind, source) of a `types.Grammar` that compiles and lets something begin. FormRefused if there is none."""
    kind, source, error = _compiled(form, names)
    if INTERSECTIONS in error:
        kind, source, error = _compiled(form, names, loose=True)
    if error:
        raise _located(form, names, _reason(form.kind, error))
    return kind, source


def _located(form: Form, names: Names, reason: str) -> FormRefused:
    """With the part of a schema that is refused for this reason, if it is one part, and its keywords that are."""
    if form.kind != "json" or reason == NOTHING_FITS:  # which part of a whole fits nothing says little about the whole
        return FormRefused("", reason)
    ends_s = process_time() + LOCATING_S

    def fails(schema: Mapping[str, Any]) -> bool:
        try:
            *_, error = _compiled(replace(form, source=json.dumps(schema)), names)
        except FormRefused:
            return False
        return bool(error) and _reason(form.kind, error) == reason

    path, keywords = fault_of(_parsed(form.source), fails, lambda: process_time() < ends_s)
    if keywords and reason == BAD_REGEX and not {"pattern", "patternProperties"} & set(keywords):
        reason = "cannot be used"  # the regular expression was made of other keywords
    if keywords and not any(f"`{key}`" in reason for key in keywords):
        reason += f"; without its {' or without its '.join(f'`{key}`' for key in keywords)} it would not be refused"
    return FormRefused(path[:MAX_REASON_CHARS], reason)


def _compiled(form: Form, names: Names, *, loose: bool = False) -> tuple[str, str, str]:
    """(kind, source, what the compiler says against it)"""
    try:
        kind, source = _made(form, loose=loose)
    except SchemaRefused as error:
        raise FormRefused(error.path, error.reason) from None
    except RecursionError:
        raise FormRefused("", "is nested too deeply") from None
    part = f'{{"json_schema": {source}}}' if kind == "json" else json.dumps({"lark_grammar": source})
    matcher = LLMatcher(byte_tokenizer(names), f'{{"grammars": [{part}]}}', log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
        matcher.compute_ff_tokens()
    return kind, source, matcher.get_error() if matcher.is_error() else ""


def _made(form: Form, *, loose: bool) -> tuple[str, str]:
    if form.kind == "json":
        schema = ready(_parsed(form.source), closed=form.closed, loose=loose)
        return "json", json.dumps({**schema, "x-guidance": _layout(form.whitespace)})
    if form.kind == "regex":
        return "lark", f"start: /{regex_to_lark(_plain_digits(_unanchored(form.source)), 'd')}/"
    if form.kind == "choice":
        return "lark", "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, json.loads(form.source)))
    if form.kind == "lark":
        return "lark", form.source
    try:
        return "lark", any_to_lark(form.source)
    except GbnfToLarkError as error:
        line = error.pos.text.count("\n", 0, error.pos.pos) + 1
        raise FormRefused("", f"is not a grammar of a known kind (GBNF, EBNF or Lark): see line {line}") from None
    except Exception as error:  # the converter's own, of no class: undefined rules, no root
        raise FormRefused("", f"is not a grammar of a known kind (GBNF, EBNF or Lark): {_cut(str(error))}") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except ValueError:
        raise FormRefused("", "must be a JSON schema") from None


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _layout(whitespace: str) -> dict[str, Any]:
    return {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}


def _unanchored(regex: str) -> str:
    """Without the anchors at both ends: the whole answer has to match anyway."""
    if "\0" in regex:
        raise FormRefused("", "must not have a NUL character")
    regex = regex.removeprefix("^")
    has_anchor = re.search(r"(?<!\\)(\\\\)*\$\Z", regex) is not None
    return regex[:-1] if has_anchor else regex


def _plain_digits(regex: str) -> str:
    r"""With `\D` as nothing that is a digit in any script; the converter makes 0 to 9 of `\d` and would make all else
    of `\D`. What clients check answers with disagrees about other digits."""
    return re.sub(r"\\(.)", lambda found: r"\P{Nd}" if found[1] == "D" else found[0], regex, flags=re.DOTALL)


def _quoted(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def byte_tokenizer(names: Names) -> LLTokenizer:
    """One token for each byte and one for each that a grammar may name; ids up to the model's last are there."""
    tokens = [bytes([value]) for value in range(NUM_BYTES)] + [b"<end>"]
    special = [NUM_BYTES]
    for text in names.texts:
        special.append(len(tokens))
        tokens.append(text.encode())
    tokens += [b""] * (names.vocab_size - len(tokens))
    return LLTokenizer(TokenizerWrapper(_Bytes(tokens, special)), n_vocab=max(names.vocab_size, len(tokens)), slices=[])


class _Bytes:
    """What `TokenizerWrapper` wants."""

    eos_token_id = NUM_BYTES
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _reason(kind: str, error: str) -> str:
    """What the compiler says, as the end of a sentence."""
    if "Token range" in error:
        return "names a token that the vocabulary does not have"
    if "NoExtension" in error or "Unsatisfiable" in error or "unsatisfiable" in error:
        return NOTHING_FITS
    if any(word in error for word in _TOO_COMPLEX):
        return "is too complex"
    if "regex for" in error and "range" in error:
        return "has bounds that cannot be used"
    if "look-ahead" in error:
        return "must not look ahead or behind (`(?=`, `(?!`, `(?<=`, `(?<!`)"
    if "backreference" in error:
        return "must not refer back to groups"
    if "oneOf" in error:
        return "has a `oneOf` whose alternatives may overlap: use `anyOf`"
    if "too deeply" in error or "recursion limit" in error or "nest limit" in error:
        return "is nested too deeply"
    if kind == "regex" or "regex parse error" in error or "invalid regex" in error:
        return BAD_REGEX
    return f"cannot be used: {_cut(error)}"


def _cut(text: str) -> str:
    line = next(iter(text.strip().splitlines()), "").partition("; following")[0].rpartition(COMPILING)[2]
    return "".join(c for c in line if c.isprintable())[:MAX_REASON_CHARS]
