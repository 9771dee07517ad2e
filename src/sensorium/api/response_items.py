"""The output of a response, item by item, and the events that tell of it. The items are what the events made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from sensorium.api.ids import new_id
from sensorium.api.protocol.responses import Names, ResponsesRequest, sealed
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]


class ResponseItems:
    """`items` are in the order in which the model made them. One is open at a time."""

    def __init__(self, body: ResponsesRequest) -> None:
        self._names = body.names()
        self._summarizes = body.summarizes
        self._seals = body.seals_reasoning
        self._parts: list[_Item] = []
        self._open: _Item | None = None
        self.status: Status = "in_progress"

    @property
    def items(self) -> list[dict[str, Any]]:
        return [item.object for item in self._parts]

    def add(self, deltas: Sequence[Delta], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """The events for new deltas. `logprobs` are of the tokens of the text among them."""
        events: list[Event] = []
        for delta in deltas:
            item = self._item_for(delta)
            if item is not self._open:
                events += self._close("completed")
                events += self._begin(item)
            if isinstance(delta, Text):
                events += item.add(delta.text, logprobs)
                logprobs = ()
            elif not isinstance(delta, Call):
                events += item.add(delta.text)
        return events

    def finish(self, *, is_whole: bool) -> list[Event]:
        """The end. An answer that was cut leaves its last item incomplete; one of nothing is an empty message."""
        self.status = "completed" if is_whole else "incomplete"
        events = [] if self._parts else self._begin(_MessageItem(0))
        return events + self._close(self.status)

    def _item_for(self, delta: Delta) -> _Item:
        """The open item that a delta belongs to, or a new one."""
        index = len(self._parts)
        match delta:
            case Text():
                return self._open if isinstance(self._open, _MessageItem) else _MessageItem(index)
            case Reasoning():
                if isinstance(self._open, _ReasoningItem):
                    return self._open
                return _ReasoningItem(index, self._summarizes, self._seals)
            case Call(_, name):
                return (
                    _CustomCallItem(index, name) if name in self._names.custom else _CallItem(index, name, self._names)
                )
            case Arguments() if self._open is not None:
                return self._open
        raise ValueError("arguments before their call")

    def _begin(self, item: _Item) -> list[Event]:
        self._open = item
        self._parts.append(item)
        return item.begin()

    def _close(self, status: Status) -> list[Event]:
        item, self._open = self._open, None
        return item.end(status) if item is not None else []


class _Item:
    """One output item: `object` is how it stands in the response, always as far as it has come."""

    def __init__(self, index: int, kind: str, fields: dict[str, Any]) -> None:
        self.index = index
        self.object: dict[str, Any] = {"id": new_id(kind), "status": "in_progress", **fields}
        self._pieces: list[str] = []

    def begin(self) -> list[Event]:
        return [{"type": "response.output_item.added", "output_index": self.index, "item": dict(self.object)}]

    def add(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        raise NotImplementedError

    def end(self, status: Status) -> list[Event]:
        self.object["status"] = status
        return [{"type": "response.output_item.done", "output_index": self.index, "item": dict(self.object)}]

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self.object["id"], "output_index": self.index, **fields}


class _MessageItem(_Item):
    def __init__(self, index: int) -> None:
        super().__init__(index, "msg", {"type": "message", "role": "assistant", "content": []})
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[Event]:
        added = super().begin()
        return [*added, self._event("content_part.added", content_index=0, part=_text_part("", []))]

    def add(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        self._pieces.append(text)
        self._logprobs.extend(logprobs)
        return [self._event("output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))]

    def end(self, status: Status) -> list[Event]:
        part = _text_part("".join(self._pieces), self._logprobs)
        self.object["content"] = [part]
        return [
            self._event("output_text.done", content_index=0, text=part["text"], logprobs=self._logprobs),
            self._event("content_part.done", content_index=0, part=part),
            *super().end(status),
        ]


class _ReasoningItem(_Item):
    """With `summarizes`, the text comes as a summary too; with `seals`, once more in a form to be sent back."""

    def __init__(self, index: int, summarizes: bool, seals: bool) -> None:
        fields: dict[str, Any] = {"type": "reasoning", "summary": [], "content": [], "encrypted_content": None}
        super().__init__(index, "rs", fields)
        self._summarizes = summarizes
        self._seals = seals

    def begin(self) -> list[Event]:
        events = [*super().begin(), self._event("content_part.added", content_index=0, part=_reasoning_part(""))]
        if self._summarizes:
            events.append(self._event("reasoning_summary_part.added", summary_index=0, part=_summary_part("")))
        return events

    def add(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        self._pieces.append(text)
        events = [self._event("reasoning_text.delta", content_index=0, delta=text)]
        if self._summarizes:
            events.append(self._event("reasoning_summary_text.delta", summary_index=0, delta=text))
        return events

    def end(self, status: Status) -> list[Event]:
        text = "".join(self._pieces)
        self.object["content"] = [_reasoning_part(text)]
        events = [
            self._event("reasoning_text.done", content_index=0, text=text),
            self._event("content_part.done", content_index=0, part=_reasoning_part(text)),
        ]
        if self._summarizes:
            self.object["summary"] = [_summary_part(text)]
            events += [
                self._event("reasoning_summary_text.done", summary_index=0, text=text),
                self._event("reasoning_summary_part.done", summary_index=0, part=_summary_part(text)),
            ]
        if self._seals:
            self.object["encrypted_content"] = sealed(text)
        return events + super().end(status)


class _CallItem(_Item):
    def __init__(self, index: int, name: str, names: Names) -> None:
        namespace, own = names.namespaces.get(name, (None, name))
        fields = {"type": "function_call", "call_id": new_id("call"), "name": own, "arguments": ""}
        if namespace is not None:
            fields["namespace"] = namespace
        super().__init__(index, "fc", fields)

    def add(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        self._pieces.append(text)
        return [self._event("function_call_arguments.delta", delta=text)]

    def end(self, status: Status) -> list[Event]:
        arguments = self.object["arguments"] = "".join(self._pieces)
        done = self._event("function_call_arguments.done", arguments=arguments, name=self.object["name"])
        return [done, *super().end(status)]


class _CustomCallItem(_Item):
    """A custom tool takes one text. It is known when the arguments that carry it are."""

    def __init__(self, index: int, name: str) -> None:
        super().__init__(
            index, "ctc", {"type": "custom_tool_call", "call_id": new_id("call"), "name": name, "input": ""}
        )

    def add(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        self._pieces.append(text)
        return []

    def end(self, status: Status) -> list[Event]:
        given = self.object["input"] = _input_of("".join(self._pieces))
        events = [self._event("custom_tool_call_input.delta", delta=given)] if given else []
        return [*events, self._event("custom_tool_call_input.done", input=given), *super().end(status)]


def _input_of(arguments: str) -> str:
    """The text in a custom call's arguments; what the model wrote instead, if it wrote anything else."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    given = value.get("input") if isinstance(value, dict) else None
    return given if isinstance(given, str) else arguments


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _summary_part(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}
