"""What an output format is to the rest of the server: typed pieces of an answer, and who makes them of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from msgspec import Struct

from sensorium.types import Grammar

Tool = Mapping[str, Any]
"""One entry of `tools` as OpenAI writes it: {"type": "function", "function": {"name", "description", "parameters"}}."""

Thinking = Literal["off", "open", "may"]
"""How an answer begins: with content; inside reasoning that the prompt opened; or as the model chooses."""


class Text(Struct, frozen=True):
    """Content. Never empty."""

    text: str


class Reasoning(Struct, frozen=True):
    """Thoughts, without their markers. Never empty."""

    text: str


class Call(Struct, frozen=True):
    """A tool call begins; its whole name. Once per index; indices are 0, 1, 2, …"""

    index: int
    name: str


class Arguments(Struct, frozen=True):
    """The next characters of the call's `arguments`, JSON text. Never taken back; joined, they are the final string.

    A call whose end was seen has JSON here unless the model wrote something else; one that was cut has what there was.
    Follows its `Call`, before the next one."""

    index: int
    text: str


Delta = Text | Reasoning | Call | Arguments


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What `tool_choice` asks for. "named" is "required" of one tool. `names` are the tools that may be called, () for
    all of the request's."""

    mode: Literal["none", "auto", "required", "named"] = "none"
    names: tuple[str, ...] = ()

    def of(self, tools: Sequence[Tool]) -> list[Tool]:
        """Those of the request's tools that may be called."""
        return [tool for tool in tools if not self.names or tool["function"]["name"] in self.names]


class Scanner(Protocol):
    """Reads one answer once, in linear time. The joined deltas do not depend on where the text was split."""

    def push(self, text: str) -> list[Delta]:
        """What is certain now. `text` is decoded text of any length; markers that are special tokens stand in it."""

    def finish(self, *, complete: bool) -> list[Delta]:
        """The rest, at the end of the answer. `complete` False: it was cut, by max_tokens or a stop string. Then a call
        stays as far as it came; a complete answer's unclosed call without arguments gets its `{}`."""

    @property
    def in_call(self) -> bool:
        """Between the beginning of a call's marker and its end: no place to look for stop strings."""

    @property
    def in_reasoning(self) -> bool:
        """The next character is a thought. True at once where the prompt opened reasoning."""


class OutputFormat(Protocol):
    """How one checkpoint writes. Frozen; shared by all requests."""

    @property
    def name(self) -> str:
        """For the log and --tool-call-parser."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Strings that the scanner must see, though their tokens may be special: those tokens survive
        skip_special_tokens. All others are to be taken out as before."""

    @property
    def reasoning_markers(self) -> tuple[str, ...]:
        """Those of `markers` that count where the request has no tools."""

    @property
    def ends(self) -> tuple[str, ...]:
        """Tokens that end an answer beside those of generation_config.json (`<|call|>`), where the vocabulary has
        them."""

    @property
    def has_tools(self) -> bool:
        """Whether the model can call tools: its template shows them and its calls can be read back."""

    @property
    def has_reasoning(self) -> bool: ...

    @property
    def reasoning_start(self) -> str:
        """What begins reasoning (`<think>`) where the model writes it. "" without reasoning."""

    @property
    def reasoning_end(self) -> str:
        """What ends reasoning (`</think>`), so that content comes next: what a thinking_token_budget forces. "" without
        reasoning."""

    def thinking(self, tail: str) -> Thinking:
        """How an answer after this tail begins."""

    def scanner(self, tail: str, tools: Sequence[Tool]) -> Scanner:
        """`tail` is the rendered prompt from the last turn's header on, the header included; it says in which state the
        answer begins. `tools` () : nothing is a call, all but reasoning is content."""

    def form_grammar(self, grammar: Grammar, tail: str, *, budget: int | None = None) -> Grammar:
        """A grammar for content, with the reasoning in front that the answer may begin with and whatever else stands
        before content in this format."""

    def budget_grammar(self, tail: str, budget: int) -> str | None:
        """Lark that ends reasoning after so many tokens (thinking_token_budget) and leaves the answer free. None where
        the answer does not reason, or its reasoning ends with a sentence."""

    def tool_grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        *,
        parallel: bool = True,
        thinking: Thinking = "off",
        budget: int | None = None,
        held: bool = False,
    ) -> str | None:
        """Lark for llguidance that holds an answer to `choice`; None where nothing needs to be held. `thinking` is what
        the method of this name says: reasoning then stands in front, of at most `budget` tokens. `held`: also where the
        model is free to call, its calls are of the tools and fit them. RequestError if a strict tool's schema can be
        held by no grammar."""
