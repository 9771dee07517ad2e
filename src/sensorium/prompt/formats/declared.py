"""What a checkpoint itself says of how it writes: transformers' response templates, in tokenizer_config.json.

Fields between literals are understood: reasoning, content, and calls as JSON objects, lists of them, or Python calls.
Regular expressions and transforms that put calls together of several places are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensorium.prompt.formats.composed import Think
from sensorium.prompt.formats.json_calls import ARGUMENT_KEYS, NAME_KEYS, JsonCalls
from sensorium.prompt.formats.notation_calls import PythonicCalls
from sensorium.prompt.formats.syntax import Syntax, Wrapping

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def declared_thinking(template: object) -> Think | None:
    """Where reasoning stands, and content if it is marked."""
    fields = _fields(template)
    for name in _THOUGHTS:
        opens, closes = _literals(fields.get(name), "open"), _literals(fields.get(name), "close")
        if len(opens) == len(closes) == 1:
            content = fields.get("content")
            frame = (*_literals(content, "open"), *_literals(content, "close"))
            return Think(opens[0], closes[0], frame=frame if len(frame) == 2 else ())
    return None


def declared_calls(template: object) -> Syntax | None:
    """How calls are written."""
    field = _fields(template).get("tool_calls")
    opens, closes = _literals(field, "open"), _literals(field, "close")
    if not isinstance(field, dict) or not opens:
        return None
    if field.get("content") == "python-call-list":
        return PythonicCalls(opens, closes)
    if field.get("content") != "json" or field.get("content_args"):
        return None
    keys = _keys(field.get("transform"))
    if keys is None:
        return None
    end = "".join(closes[:1])
    wrapping = (
        Wrapping(f"{opens[0]}[", between=", ", after=f"]{end}")
        if field.get("transform_each")
        else Wrapping(each_before=opens[0], each_after=end, between="\n")
    )
    return JsonCalls(opens, closes, wrapping, name_key=keys[0], argument_key=keys[1])


def _fields(template: object) -> Mapping[str, Any]:
    fields = template.get("fields") if isinstance(template, dict) else None
    return fields if isinstance(fields, dict) else {}


def _literals(field: object, name: str) -> tuple[str, ...]:
    """The literals that open or close a field; () without any, or where none can be told from another."""
    found = field.get(name) if isinstance(field, dict) else None
    listed = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    texts = tuple(text for text in listed if isinstance(text, str) and text.strip())
    clash = any(one != other and one.startswith(other) for one in texts for other in texts)
    return () if clash or len(texts) < len(listed) else texts


def _keys(transform: object) -> tuple[str, str] | None:
    """Under which keys of the model's object its name and its arguments stand."""
    if transform is None or (isinstance(transform, dict) and transform.get("function") == "{content}"):
        return "name", "arguments"
    function = transform.get("function") if isinstance(transform, dict) else None
    if not isinstance(function, dict):
        return None
    name, arguments = (_key(function.get(key)) for key in ("name", "arguments"))
    return (name, arguments) if name in NAME_KEYS and arguments in ARGUMENT_KEYS else None


def _key(placeholder: object) -> str:
    """`{content.name}`, or `{name}` of a list's entries -> `name`."""
    text = placeholder if isinstance(placeholder, str) else ""
    return text[1:-1].removeprefix("content.") if text.startswith("{") and text.endswith("}") else ""
