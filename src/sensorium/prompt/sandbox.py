"""The Jinja environment of chat templates: sandboxed, with the names that templates on the hub expect and no others.

Compiling and rendering here can neither reach Python's objects nor write anywhere, and output is bounded. Time and
memory are not: that takes a process that can be killed (`render_worker`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sensorium.prompt.inspection import GLOBALS, MAX_PROBE_CHARS, MAX_RENDERED_CHARS, Inspection, TemplateInvalid

_MAX_PRODUCT = 1 << 20  # characters or items that one `*` may make


class TemplateRefusal(TemplateError):
    """The template's author calls `raise_exception(message)`: the messages do not suit the model."""


class TemplateTooLarge(TemplateError):
    pass


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote, for training. Here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or max(_length(left), _length(right)) * max(_count(left), _count(right)) > _MAX_PRODUCT:
            raise TemplateTooLarge(f"The chat template's '{operator}' would make too large a value.")
        return super().call_binop(context, operator, left, right)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def new_environment() -> Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    names = {**environment.globals, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals = {name: names[name] for name in GLOBALS}
    return environment


def inspect(environment: Environment, source: str, probes: Sequence[Mapping[str, Any]]) -> Inspection:
    """What the template reads and can write, and what it makes of each probe's variables. TemplateInvalid."""
    try:
        template, tree = environment.from_string(source), environment.parse(source)
    except (TemplateError, SyntaxError, RecursionError) as error:  # Python's own limits: loops in loops in loops
        raise TemplateInvalid(str(error)) from None
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return Inspection(
        free_names=tuple(sorted(meta.find_undeclared_variables(tree))),
        texts=tuple(dict.fromkeys(texts)),
        outputs=tuple(_tried(template, probe) for probe in probes),
    )


def _tried(template: Template, variables: Mapping[str, Any]) -> str:
    try:
        return render(template, variables)[:MAX_PROBE_CHARS]
    except Exception:  # whatever a template's program raises: it does not take this
        return ""


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """The template's output, piece by piece, so that a runaway loop that writes ends at a bound."""
    pieces: list[str] = []
    size = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_RENDERED_CHARS:
            raise TemplateTooLarge("The chat template's output is too large.")
    return "".join(pieces)


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which models have not seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
