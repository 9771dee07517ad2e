"""What a way of writing calls has to know: where a call begins, how to read it, how to hold a model to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sensorium.prompt.formats.base import Tool
from sensorium.prompt.formats.lark import Rules
from sensorium.prompt.formats.reader import Reader, Steps
from sensorium.prompt.formats.sink import Sink


class Tools:
    """A request's tools by name."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._parameters = {str(tool["function"]["name"]): parameters_of(tool) for tool in tools}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def schema(self, name: str) -> Mapping[str, Any]:
        """The parameters' JSON schema; {} for an unknown tool."""
        return self._parameters.get(name, {})


def parameters_of(tool: Tool) -> Mapping[str, Any]:
    found = tool["function"].get("parameters")
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True, slots=True)
class Wrapping:
    """Literals around calls for a grammar: `before` and `after` all of them and each of them, and `between` two."""

    before: str = ""
    each_before: str = ""
    each_after: str = ""
    between: str = ""
    after: str = ""


NO_WRAPPING = Wrapping()


class Syntax(Protocol):
    """One way of writing calls. Stateless."""

    @property
    def opens(self) -> tuple[str, ...]:
        """Markers that begin a call wherever they stand."""

    @property
    def closes(self) -> tuple[str, ...]:
        """Markers that end one; alone they are dropped."""

    @property
    def inner(self) -> tuple[str, ...]:
        """Markers within a call."""

    @property
    def wrapping(self) -> Wrapping: ...

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        """Read the calls that begin with this marker, which was read."""

    def read_unmarked(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[bool]:
        """At the beginning of content: read calls that have no marker, if there are any. Else nothing is read."""

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        """Lark of one call of this tool with arguments of this schema, without what `wrapping` has."""


class Marked:
    """Mixin of those that have a marker before every call."""

    @property
    def inner(self) -> tuple[str, ...]:
        return ()

    def read_unmarked(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[bool]:
        yield from ()
        return False
