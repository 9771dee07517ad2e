"""Answers the lines of a batch, as many at a time as whoever answers takes; what is refused for now is asked again."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec

from sensorium.cli.batch_lines import InputFile, Journal, Line, LineError, custom_id_of, line_id, output_line
from sensorium.cli.client import JSON_BODY, Answer, RemoteError, UnreachableError
from sensorium.cli.progress import Count
from sensorium.errors import MediaError, StartupError

FOR_NOW = frozenset((408, 429, 502, 503, 504))
"""Statuses that say nothing about the line."""
TRIES = 5  # of a line that is under way alone
LONGEST_WAIT_S = 30.0
GROWTH = 0.25
FORM_URLS = ("/audio/transcriptions", "/audio/translations")
FILE_URL = "file_url"


class Ask(Protocol):
    async def __call__(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """POST; the answer whatever its status. RemoteError if there is none."""


Fetch = Callable[[str], Awaitable[bytes]]
"""The file behind a URL (http, https, data, file). MediaError if it cannot be had."""


class Window:
    """How many lines may be under way: `most`, fewer after refusals, then slowly more again."""

    def __init__(self, most: int) -> None:
        self._most = self._limit = float(most)
        self._epoch = 0
        self._entered = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[int]:
        """What comes out is for `refused`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._entered < int(self._limit))
            self._entered += 1
        try:
            yield self._epoch
        finally:
            self._entered -= 1
            async with self._changed:
                self._changed.notify_all()

    def refused(self, epoch: int) -> bool:
        """Half as many from now on; of all that were under way together the first refusal counts. Whether it was the
        only one allowed."""
        was_alone = self._limit < 2
        if epoch == self._epoch:
            self._epoch += 1
            self._limit = max(1.0, self._limit / 2)
        return was_alone

    def accepted(self) -> None:
        self._limit = min(self._most, self._limit + GROWTH)


class Batch:
    """One file's lines. What has an answer in the journal is not asked again."""

    def __init__(self, lines: InputFile, journal: Journal, ask: Ask, fetch: Fetch, *, most: int) -> None:
        self._lines = lines
        self._journal = journal
        self._ask = ask
        self._fetch = fetch
        self._most = most
        self._window = Window(most)
        self.failed = self.tokens = 0

    async def run(self, count: Count) -> None:
        """Until every line has an answer. StartupError if nobody answers any more: it goes on when it is run again."""
        left = (number for number in range(len(self._lines)) if number not in self._journal.done)

        async def worker() -> None:
            for number in left:
                await self._answer(number, count)

        workers = min(self._most, len(self._lines) - len(self._journal.done))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(worker())
        except* StartupError as errors:
            raise errors.exceptions[0] from None

    async def _answer(self, number: int, count: Count) -> None:
        raw = self._lines.raw(number)
        id = line_id(number, raw)
        answer: Answer | LineError
        try:
            answer = await self._whole_answer(self._lines.request(number, raw), id)
        except LineError as error:
            answer = error
        has_failed = isinstance(answer, LineError) or answer.status != 200
        self._journal.add(number, output_line(id, custom_id_of(raw), answer))
        tokens = 0 if isinstance(answer, LineError) else _tokens(answer.body)
        self.failed, self.tokens = self.failed + has_failed, self.tokens + tokens
        count(tokens=tokens, failed=has_failed)

    async def _whole_answer(self, line: Line, id: str) -> Answer:
        headers, body = await self._written(line)
        answer = await self._patiently(line, {**headers, "X-Request-Id": id}, body)
        if answer.is_stream:
            raise LineError("stream", "The answer is a stream: set `stream` to false.")
        return answer

    async def _written(self, line: Line) -> tuple[Mapping[str, str], bytes]:
        """The request's headers and body: JSON, or a form where the endpoint takes a file."""
        if not line.url.endswith(FORM_URLS):
            return JSON_BODY, bytes(line.body)
        fields = msgspec.json.decode(line.body)
        url = fields.pop(FILE_URL, None)
        if not isinstance(url, str):
            raise LineError("missing_required_parameter", f"`{FILE_URL}` is required: an http(s):, data: or file: URL.")
        try:
            return form_of(fields, await self._fetch(url))
        except MediaError as error:
            raise LineError(error.code, error.message) from None

    async def _patiently(self, line: Line, headers: Mapping[str, str], body: bytes) -> Answer:
        tries = 0
        while True:
            tries += 1
            async with self._window.place() as epoch:
                found = await self._once(line, headers, body)
            if isinstance(found, Answer) and found.status not in FOR_NOW:
                self._window.accepted()
                return found
            if not self._window.refused(epoch):
                tries = 0
            if tries >= TRIES:
                return _given_up(found)
            await asyncio.sleep(min(max(2.0**tries / 4, _wished_s(found)), LONGEST_WAIT_S))

    async def _once(self, line: Line, headers: Mapping[str, str], body: bytes) -> Answer | RemoteError:
        try:
            return await self._ask(line.url, headers, body)
        except RemoteError as error:
            return error


def _given_up(found: Answer | RemoteError) -> Answer:
    if isinstance(found, Answer):
        return found
    if isinstance(found, UnreachableError):
        raise StartupError(f"{found.message}; what is answered is kept, and the rest is asked when it is run again")
    raise LineError("no_answer", f"{found.message}.")


def _wished_s(found: Answer | RemoteError) -> float:
    """What Retry-After says."""
    said = found.headers.get(b"retry-after", b"") if isinstance(found, Answer) else b""
    return float(said) if said.isdigit() else 0.0


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Counted(msgspec.Struct):
    usage: _Usage | None = None


_COUNTED = msgspec.json.Decoder(_Counted)


def _tokens(body: bytes) -> int:
    """What was generated, if the answer says it."""
    try:
        usage = _COUNTED.decode(body).usage
    except msgspec.DecodeError:
        return 0
    return usage.completion_tokens if usage is not None else 0


def form_of(fields: Mapping[str, Any], file: bytes) -> tuple[Mapping[str, str], bytes]:
    """Headers and body of a form with these fields and a file."""
    boundary = secrets.token_hex(16)
    values = [(name, one) for name, value in fields.items() for one in _form_values(value)]
    head = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{_form_name(name, fields)}"\r\n\r\n{value}\r\n'
        for name, value in values
    )
    head += (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = b"".join((head.encode(), file, f"\r\n--{boundary}--\r\n".encode()))
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body


def _form_name(name: str, fields: Mapping[str, Any]) -> str:
    if not name.replace("_", "").isalnum():
        raise LineError("invalid_value", f"{name!r} is not a field's name.")
    return f"{name}[]" if isinstance(fields[name], list) else name


def _form_values(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [text for one in value for text in _form_values(one)]
    return [value if isinstance(value, str) else json.dumps(value)]
