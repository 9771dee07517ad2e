"""Tools and calls of a chat in the form that a template takes: what it wants is found out by trying, once."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sensorium.prompt.formats.catalogue import THINKING
from sensorium.prompt.formats.detect import PROBE_ARGUMENTS, PROBE_TOOL
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.told import Told, told_for
from sensorium.types import Modality

PROBE = "Probe7f3a"
SHORT_ID = 9  # characters of a call's id in Mistral's templates
_PROBE_ID = "probe7f3a"
_LONG_ID = "call_0123456789abcdef"
_RESULT = "Result7f3a"
_ALPHABET = string.ascii_letters + string.digits
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """What a template does with tools.

    `shows_tools`: it tells the model of them; `in_system`: only as JSON text in the system message. `told`: what says
    for it what it leaves out. `as_text`: it wants a call's arguments as JSON text. `short_ids`: ids of calls have nine
    letters and digits. `media`: what it takes in a tool's result. `header`: how the assistant's turn begins.
    `written`: what it makes of a call, or what is written for it.
    """

    shows_tools: bool = False
    in_system: bool = False
    told: Told | None = None
    as_text: bool = False
    short_ids: bool = False
    media: frozenset[Modality] = frozenset()
    knows_developer: bool = False
    header: str = ""
    written: tuple[str, ...] = field(default=(), repr=False)

    def tail(self, text: str) -> str:
        """A rendered prompt from the last turn's header on; "" where turns have none."""
        at = text.rfind(self.header) if self.header else -1
        return text[at:] if at >= 0 else ""


# Finding out.


def tool_probes(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Variables whose renderings `style_of` reads, with contents as text and as parts. `parts`: content parts that are
    tried in a tool's result."""
    chats = [chat for as_parts in (False, True) for chat in _probe_chats(as_parts=as_parts)]
    for part in parts:
        result = _result(_PROBE_ID, [{"type": "text", "text": _RESULT}, dict(part)])
        chats.append(([_said("user", PROBE, as_parts=True), _calling(PROBE_ARGUMENTS), result], [PROBE_TOOL], False))
    return [
        {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generates}
        for messages, tools, generates in chats
    ]


Chat = tuple[list[dict[str, Any]], object, bool]  # messages, tools, whether the assistant's turn begins


def _probe_chats(*, as_parts: bool) -> list[Chat]:
    user, system = _said("user", PROBE, as_parts=as_parts), _said("system", PROBE, as_parts=as_parts)
    tools = [PROBE_TOOL]
    content = [{"type": "text", "text": _RESULT}] if as_parts else _RESULT
    return [
        ([user], None, False),
        ([user], None, True),
        ([user], tools, True),
        ([{**system, "tools": json.dumps(tools)}, user], None, True),
        ([user, _calling(PROBE_ARGUMENTS), _result(_PROBE_ID, content)], tools, False),
        ([user, _calling(json.dumps(PROBE_ARGUMENTS)), _result(_PROBE_ID, content)], tools, False),
        ([user, _calling(PROBE_ARGUMENTS, _LONG_ID), _result(_LONG_ID, content)], tools, False),
    ]


def _said(role: str, text: str, *, as_parts: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}


def _calling(arguments: object, call_id: str = _PROBE_ID) -> dict[str, Any]:
    function = {"name": PROBE_TOOL["function"]["name"], "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def _result(call_id: str, content: object) -> dict[str, Any]:
    name = PROBE_TOOL["function"]["name"]
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


def style_of(source: str, outputs: Iterator[str], *, takes_strings: bool) -> ToolStyle:
    """What the renderings of `tool_probes` say, up to those of parts, which are left in `outputs`."""
    forms = [[next(outputs, "") for _ in _probe_chats(as_parts=form)] for form in (False, True)]
    before, after, shown, in_system, as_object, as_text, long_id = forms[0 if takes_strings else 1]
    name = str(PROBE_TOOL["function"]["name"])
    header = _header(before, after)
    only_text = (name not in as_object and name in as_text) or "{'place'" in as_object
    shows, calls = name in shown or name in in_system, _after(as_text if only_text else as_object, header)
    told = told_for(source, shows_tools=shows, writes_calls=name in calls)
    if told is not None:
        calls = told.calls(_calling(PROBE_ARGUMENTS)["tool_calls"])
    return ToolStyle(
        shows_tools=shows or (told is not None and told.tools is not None),
        in_system=name not in shown and name in in_system,
        told=told,
        as_text=only_text,
        short_ids=bool(as_object) and not long_id,
        knows_developer="developer" in source,
        header=header,
        written=(calls,),
    )


def _header(before: str, after: str) -> str:
    """What a prompt for the assistant's turn has at its end, up to a tag of reasoning there."""
    pairs = zip(before, after, strict=False)
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(before), len(after)))
    token = after.rfind("<", 0, same)
    if token >= 0 and ">" not in after[token:same]:  # two tokens that begin alike
        same = token
    added = after[same:]
    tags = [tag for think in THINKING.values() for tag in (think.start.strip(), think.end)]
    return added[: min((at for tag in tags if (at := added.find(tag)) >= 0), default=len(added))]


def _after(output: str, header: str) -> str:
    """A rendered conversation from the assistant's turn to the tool's result."""
    turn = output.partition(PROBE)[2].partition(_RESULT)[0]
    begun = turn.partition(header.strip())[2] if header.strip() else ""
    return begun or turn


# Giving a template what it wants.


def in_style(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, style: ToolStyle
) -> tuple[Sequence[Message], list[dict[str, Any]] | None]:
    """Messages and tools as the template takes them; None for no tools. Media keep their order."""
    shown = [_bare(tool) for tool in tools or ()] or None
    if shown is not None and style.in_system:
        messages, shown = _with_tools_in_system(messages, shown), None
    if any(message.extra or message.role in ("tool", "developer") for message in messages):
        messages = _Chat(style).of(messages)
    if shown is not None and style.told is not None and style.told.tools is not None:
        messages, shown = _with_text_in_front(messages, style.told.tools(shown)), None
    return messages, shown


def _bare(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool without what is for the server."""
    function = {name: value for name, value in tool["function"].items() if value is not None and name != "strict"}
    return {"type": "function", "function": function}


def _with_tools_in_system(messages: Sequence[Message], tools: list[dict[str, Any]]) -> list[Message]:
    text = json.dumps(tools, ensure_ascii=False)
    if messages and messages[0].role in ("system", "developer"):
        first = replace(messages[0], role="system", extra={**messages[0].extra, "tools": text})
        return [first, *messages[1:]]
    return [Message("system", (TextPart(""),), extra={"tools": text}), *messages]


def _with_text_in_front(messages: Sequence[Message], text: str) -> list[Message]:
    """Behind the system message's text, or before all others."""
    first = messages[0]
    texts = (*first.content, TextPart(text)) if first.role == "system" else (TextPart(f"{text}\n"), *first.content)
    return [replace(first, content=_one_text(texts)), *messages[1:]]


class _Chat:
    """Messages on their way into one template's form."""

    def __init__(self, style: ToolStyle) -> None:
        self._style = style
        self._names: dict[str, str] = {}  # id of a call -> the tool's name
        self._moved: list[MediaPart] = []  # out of results, into the message that follows them

    def of(self, messages: Sequence[Message]) -> list[Message]:
        made: list[Message] = []
        for message in messages:
            if message.role != "tool":
                made += self._moved_media()
            made.append(self._made(message))
        made += self._moved_media()
        told = self._style.told
        return _joined(made) if told is not None and told.result_role == "user" else made

    def _moved_media(self) -> list[Message]:
        moved, self._moved = self._moved, []
        return [Message("user", tuple(moved))] if moved else []

    def _made(self, message: Message) -> Message:
        match message.role:
            case "tool":
                return self._result(message)
            case "developer" if not self._style.knows_developer:
                return replace(message, role="system")
            case "assistant" if message.extra:
                return replace(message, extra=self._turn(message.extra))
        return message

    def _turn(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Calls, and reasoning under every name that templates read."""
        made = {name: value for name, value in extra.items() if name not in (*_REASONING, "tool_calls")}
        if thoughts := next((extra[name] for name in _REASONING if extra.get(name)), None):
            made |= dict.fromkeys(_REASONING, thoughts)
        if calls := extra.get("tool_calls"):
            made["tool_calls"] = [self._call(call) for call in calls]
        return made

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        name, written = call["function"]["name"], call["function"].get("arguments")
        self._names[call["id"]] = name
        arguments = parsed(written)
        given = json.dumps(arguments, ensure_ascii=False) if self._style.as_text else arguments
        return {"id": self._id(call["id"]), "type": "function", "function": {"name": name, "arguments": given}}

    def _result(self, message: Message) -> Message:
        call_id = str(message.extra.get("tool_call_id", ""))
        extra: dict[str, Any] = {"tool_call_id": self._id(call_id)}
        name = message.name or self._names.get(call_id)
        media = [part for part in message.content if isinstance(part, MediaPart)]
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
        if (told := self._style.told) is not None:
            said = TextPart(told.result % "\n".join(texts))
            self._moved += media
            return Message(told.result_role, (said,), name, {} if told.result_role == "user" else extra)
        if media and all(part.kind in self._style.media for part in media):
            return replace(message, name=name, extra=extra)
        self._moved += media
        return replace(message, name=name, extra=extra, content=(TextPart("\n".join(texts)),))

    def _id(self, call_id: str) -> str:
        if not self._style.short_ids or (len(call_id) == SHORT_ID and call_id.isascii() and call_id.isalnum()):
            return call_id
        digest = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()
        return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:SHORT_ID])


def _joined(messages: Sequence[Message]) -> list[Message]:
    """What users say in a row as one message: turns alternate."""
    made: list[Message] = []
    for message in messages:
        if made and made[-1].role == message.role == "user":
            made[-1] = replace(made[-1], content=_one_text((*made[-1].content, *message.content)))
        else:
            made.append(message)
    return made


def _one_text(parts: Sequence[TextPart | MediaPart]) -> tuple[TextPart | MediaPart, ...]:
    """Neighbouring texts as one."""
    made: list[TextPart | MediaPart] = []
    for part in parts:
        if made and isinstance(made[-1], TextPart) and isinstance(part, TextPart):
            made[-1] = TextPart(f"{made[-1].text}\n{part.text}")
        else:
            made.append(part)
    return tuple(made)


def parsed(arguments: object) -> dict[str, Any]:
    """A call's arguments as an object; {} for what is none: a template must not fail in every later turn."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if isinstance(arguments, dict) else {}
