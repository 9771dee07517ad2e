"""`sensorium chat`: talk to a running server from a terminal. A client like any other, it knows no engine."""

from __future__ import annotations

import asyncio
import base64
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
from rich.console import Console

from sensorium.cli.client import Endpoint, Remote, RemoteError
from sensorium.config import ChatConfig
from sensorium.errors import StartupError
from sensorium.types import Modality

COMMANDS = {
    "/image PATH": "attach an image to your next message",
    "/audio PATH": "attach a recording",
    "/video PATH": "attach a clip",
    "/clear": "start over",
    "/help": "list the commands",
    "/quit": "end, as Ctrl-D does",
}
HINT = "/help lists what else you can type."
_TYPES: Mapping[Modality, str] = {"image": "image/jpeg", "audio": "audio/wav", "video": "video/mp4"}
"""For files whose name does not tell, or tells of another kind (a recording in WebM); the server looks at the bytes."""


class Conversation:
    """The messages so far, and the media that wait for the next one."""

    def __init__(self, config: ChatConfig, model: str) -> None:
        self._config = config
        self._model = model
        self._media: list[dict[str, Any]] = []
        self._messages: list[dict[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        self._media = []
        self._messages = [{"role": "system", "content": self._config.system}] if self._config.system else []

    def attach(self, kind: Modality, path: Path) -> None:
        """OSError if the file cannot be read."""
        guessed = mimetypes.guess_type(path.name)[0] or ""
        named = guessed if guessed.startswith(f"{kind}/") else _TYPES[kind]
        url = f"data:{named};base64,{base64.b64encode(path.read_bytes()).decode()}"
        self._media.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})

    def ask(self, text: str) -> bytes:
        """Take the user's turn; the body of the request for the model's."""
        parts, self._media = self._media, []
        self._messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text})
        body = {"model": self._model, "messages": self._messages, "max_tokens": self._config.max_tokens, "stream": True}
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        return msgspec.json.encode(body)

    def answer(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget a turn that got no answer."""
        self._messages.pop()


def chat(config: ChatConfig) -> int:
    """The command. Ends with 0 when the user leaves."""
    try:
        with asyncio.Runner() as runner:
            return runner.run(_chat(config))
    except RemoteError as error:
        raise StartupError(f"{config.base_url}: {error.message}") from None


async def _chat(config: ChatConfig) -> int:
    console = Console(highlight=False)
    async with Remote(Endpoint.parse(config.base_url, config.api_key)) as remote:
        model = config.model or (await remote.models())[0]
        conversation = Conversation(config, model)
        console.print(f"[bold]{model}[/] at {config.base_url}. {HINT}")
        while (line := _read(console)) is not None:
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return 0
            if command == "/clear":
                conversation.clear()
            elif command in ("/image", "/audio", "/video"):
                _attach(console, conversation, cast(Modality, command[1:]), rest)
            elif line.startswith("/"):
                if command != "/help":
                    console.print(f"there is no {command}", style="red", markup=False)
                _help(console)
            elif line:
                await _turn(console, remote, conversation, line)
    return 0


def _read(console: Console) -> str | None:
    try:
        return console.input("[bold green]> [/]").strip()
    except EOFError:
        console.print()
        return None


def _help(console: Console) -> None:
    for command, meaning in COMMANDS.items():
        console.print(f"  {command:<12} {meaning}", markup=False)


def _attach(console: Console, conversation: Conversation, kind: Modality, path: str) -> None:
    if not path.strip():
        console.print(f"/{kind} needs the path of a file", style="red", markup=False)
        return
    try:
        conversation.attach(kind, Path(path.strip().strip("'\"")).expanduser())
    except OSError as error:
        console.print(f"cannot read it: {error.strerror}", style="red", markup=False)
    else:
        console.print("attached; now ask about it")


async def _turn(console: Console, remote: Remote, conversation: Conversation, line: str) -> None:
    pieces: list[str] = []
    thinks, ended_by = False, ""

    def on_event(data: bytes) -> None:
        nonlocal thinks, ended_by
        chunk = msgspec.json.decode(data)
        if "error" in chunk:
            raise RemoteError(str(chunk["error"].get("message", "the server reports an error")))
        if not chunk.get("choices"):
            return
        choice = chunk["choices"][0]
        delta, ended_by = choice["delta"], choice.get("finish_reason") or ended_by
        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
            thinks = True
            console.out(printable(thought), style="dim", end="")
        if text := delta.get("content"):
            if thinks:
                console.print()
            thinks = False
            pieces.append(text)
            console.out(printable(text), end="")

    try:
        await remote.stream("/chat/completions", conversation.ask(line), on_event)
    except RemoteError as error:
        conversation.take_back()
        console.print(f"\n{error.message}", style="red", markup=False)
    else:
        conversation.answer("".join(pieces))
        console.print()
        if ended_by == "length":
            console.print("(cut: --max-tokens allows longer answers)", style="yellow", markup=False)


def printable(text: str) -> str:
    """Without control characters: a model must not drive the terminal."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())
