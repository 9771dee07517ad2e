"""The terminal chat: what a line makes of the next request."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.api_support import ANSWER, serving

from sensorium.cli import chat
from sensorium.config import ChatConfig


def test_media_go_with_the_next_message_in_order(tmp_path: Path) -> None:
    for name in ("a.png", "b.mp3", "c.webm", "d"):
        (tmp_path / name).write_bytes(name.encode())
    conversation = chat.Conversation(ChatConfig(), "m")
    for kind, name in (("image", "a.png"), ("audio", "b.mp3"), ("video", "c.webm"), ("audio", "d")):
        conversation.attach(kind, tmp_path / name)  # type: ignore[arg-type]
    [message] = json.loads(conversation.ask("hi"))["messages"]
    wanted = (("image", "image/png", b"a.png"), ("audio", "audio/mpeg", b"b.mp3"), ("video", "video/webm", b"c.webm"))
    assert message["content"] == [
        *(
            {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{named};base64,{base64.b64encode(data).decode()}"}}
            for kind, named, data in (*wanted, ("audio", "audio/wav", b"d"))
        ),
        {"type": "text", "text": "hi"},
    ]
    assert json.loads(conversation.ask("again"))["messages"][1]["content"] == "again"


@pytest.mark.parametrize(
    ("kind", "name", "named"),
    [
        ("audio", "recorded.webm", "audio/wav"),
        ("audio", "clip.mp4", "audio/wav"),
        ("video", "tune.ogg", "video/mp4"),
        ("image", "notes.txt", "image/jpeg"),
        ("image", "a.webp", "image/webp"),
    ],
)
def test_a_file_is_sent_as_what_it_is_said_to_be(kind: Any, name: str, named: str, tmp_path: Path) -> None:
    """The server refuses a URL of another kind, in words about a URL that nobody typed."""
    (tmp_path / name).write_bytes(b"x")
    conversation = chat.Conversation(ChatConfig(), "m")
    conversation.attach(kind, tmp_path / name)
    [message] = json.loads(conversation.ask("hi"))["messages"]
    assert message["content"][0][f"{kind}_url"]["url"].startswith(f"data:{named};")


async def talk(monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[Any]:
    """What a user sees who types these lines; returns what the engine was asked."""
    typed: Iterator[str] = iter(lines)

    def read(console: Console, prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Console, "input", read)
    async with serving() as served:
        assert await chat._chat(ChatConfig(base_url=served.url, max_tokens=64)) == 0
        return served.engine.requests


async def test_commands_are_listed_and_files_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a b.png").write_bytes(b"x")
    image = f"/image '{tmp_path}/a b.png'"
    lines = ("/help", "/nonsense", "/audio", "/video /nowhere/x.mp4", image, "/clear", "hi")
    asked = await talk(monkeypatch, *lines)
    shown = capsys.readouterr().out
    for command in chat.COMMANDS:
        assert shown.count(f"  {command}") == 2
    assert "there is no /nonsense" in shown and "there is no /help" not in shown
    assert "/audio needs the path of a file" in shown
    assert "cannot read it: No such file" in shown
    assert "attached; now ask about it" in shown
    assert ANSWER in shown
    assert len(asked) == 1


class Saying:
    """A server that answers with these deltas."""

    def __init__(self, *deltas: dict[str, str], finish_reason: str) -> None:
        self._choices: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None} for delta in deltas]
        self._choices[-1]["finish_reason"] = finish_reason

    async def stream(self, path: str, body: bytes, on_event: Callable[[bytes], None]) -> None:
        for choice in self._choices:
            on_event(json.dumps({"choices": [choice]}).encode())
        on_event(json.dumps({"choices": [], "usage": {}}).encode())


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("end", ["stop", "length"])
async def test_thoughts_are_shown_but_not_sent_back_and_a_cut_is_told(
    name: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server: Any = Saying(
        {"content": ""}, {name: "Hm"}, {name: "m."}, {"content": "Yes"}, {"content": "."}, finish_reason=end
    )
    conversation = chat.Conversation(ChatConfig(), "m")
    await chat._turn(Console(highlight=False), server, conversation, "well?")
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["Hmm.", "Yes."] and ("--max-tokens" in shown[-1]) == (end == "length")
    assert json.loads(conversation.ask("and?"))["messages"][1] == {"role": "assistant", "content": "Yes."}


async def test_a_refused_message_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    asked = await talk(monkeypatch, f"/audio {tmp_path}/a.wav", "what is said?", "hi", "/quit", "never")
    assert "takes no audio input" in capsys.readouterr().out
    assert len(asked) == 1
