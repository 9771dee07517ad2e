"""Answers in Ollama's form: a line of JSON for what is new, and one at the end with figures."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sensorium.api.ids import new_id
from sensorium.api.message_content import arguments_object
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text
from sensorium.serving.generation import Choice, Generation

LINES = b"application/x-ndjson"


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Pieces:
    """What an answer says, put together as Ollama has it: calls come whole, their arguments as objects."""

    def __init__(self) -> None:
        self._name = ""  # of the call that has begun
        self._arguments: list[str] = []
        self._calls = 0

    def take(self, deltas: Iterable[Delta], *, ends: bool = False, cut: bool = False) -> dict[str, Any]:
        """What is new: `content`, `thinking` and `tool_calls`, those that there are. `ends`: nothing follows;
        `cut`: the answer did not end by itself."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for delta in deltas:
            match delta:
                case Text(text):
                    texts.append(text)
                case Reasoning(text):
                    thoughts.append(text)
                case Call(_, name):
                    self._finish(calls)
                    self._name = name
                case Arguments(_, text):
                    self._arguments.append(text)
        if ends:
            self._finish(calls, cut=cut)
        found: dict[str, Any] = {"content": "".join(texts)}
        if thoughts:
            found["thinking"] = "".join(thoughts)
        if calls:
            found["tool_calls"] = calls
        return found

    def _finish(self, calls: list[dict[str, Any]], *, cut: bool = False) -> None:
        if not self._name:
            return
        arguments = arguments_object("".join(self._arguments), cut=cut)
        function = {"index": self._calls, "name": self._name, "arguments": arguments}
        calls.append({"id": new_id("call"), "function": function})
        self._name, self._arguments = "", []
        self._calls += 1


def figures(generation: Generation, choice: Choice) -> dict[str, Any]:
    """Why it ended, how many tokens and nanoseconds it took."""
    return {
        "done_reason": choice.finish_reason,
        "total_duration": _ns(time.perf_counter() - generation.started_s),
        "load_duration": 0,
        "prompt_eval_count": generation.prompt_tokens,
        "prompt_eval_duration": _ns(choice.first_s - choice.started_s),
        "eval_count": choice.num_tokens,
        "eval_duration": _ns(choice.last_s - choice.first_s),
    }


def _ns(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
