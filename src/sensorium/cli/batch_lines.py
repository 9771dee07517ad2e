"""The files of `run-batch`: requests in, one JSON object a line; a journal of what is done; answers out, in order.

A line's answer is appended to the journal with one write, so that a process that is killed leaves whole records and at
most one torn one. The output is written from the journal under another name and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sensorium.cli.client import Answer
from sensorium.errors import StartupError

BLANK = b" \t\r\n"


class LineError(Exception):
    """A line that is no request; what its answer says instead."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Line(msgspec.Struct):
    """One request, as OpenAI's batch files have it."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Named(msgspec.Struct):
    custom_id: str


_LINE, _NAMED = msgspec.json.Decoder(Line), msgspec.json.Decoder(_Named)
_RECORD = msgspec.json.Decoder(dict[str, msgspec.Raw])


class InputFile:
    """A file of requests, read line by line: it may be larger than memory. Blank lines do not count."""

    def __init__(self, path: Path) -> None:
        """StartupError if it cannot be read."""
        self._offsets = array("q")
        self._repeated: set[int] = set()
        digest, names = hashlib.sha256(), set[str]()
        try:
            self._file = path.open("rb")
            for raw in self._raw_lines():
                digest.update(raw)
                name = custom_id_of(raw)
                if name in names:
                    self._repeated.add(len(self._offsets) - 1)
                elif name is not None:
                    names.add(name)
        except OSError as error:
            raise StartupError(f"--input-file {path}: {error.strerror}") from None
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def _raw_lines(self) -> Iterator[bytes]:
        offset = 0
        for raw in self._file:
            if raw.strip(BLANK):
                self._offsets.append(offset)
                yield raw
            offset += len(raw)

    def raw(self, number: int) -> bytes:
        """Line `number` as it stands in the file, counted from 0."""
        self._file.seek(self._offsets[number])
        return self._file.readline().strip(BLANK)

    def request(self, number: int, raw: bytes) -> Line:
        """What line `number` asks; LineError says why it asks nothing."""
        try:
            line = _LINE.decode(raw)
        except msgspec.DecodeError as error:
            raise LineError(
                "invalid_line", f'The line is not {{"custom_id", "method", "url", "body"}}: {error}.'
            ) from None
        if number in self._repeated:
            raise LineError("duplicate_custom_id", "Another line before this one has the same `custom_id`.")
        if line.method != "POST":
            raise LineError("invalid_method", "`method` must be POST.")
        if not line.url.startswith("/"):
            raise LineError("invalid_url", "`url` must be an endpoint's path, such as /v1/chat/completions.")
        if not bytes(line.body).lstrip(BLANK).startswith(b"{"):
            raise LineError("invalid_body", "`body` must be a JSON object.")
        return line


def custom_id_of(raw: bytes) -> str | None:
    try:
        return _NAMED.decode(raw).custom_id
    except msgspec.DecodeError:
        return None


@dataclass(frozen=True, slots=True)
class Place:
    """Of an answer in the journal."""

    offset: int
    size: int


class Journal:
    """The answers that are there, by line. One process at a time has it.

    The first line says what the journal is of, each other one is a line's number and its answer.
    """

    def __init__(self, path: Path, about: dict[str, object], lines: int) -> None:
        """Opened, or begun. StartupError if it belongs to something else or to another process."""
        self._path = path
        self.done: dict[int, Place] = {}
        self._head = msgspec.json.encode(about) + b"\n"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StartupError(f"The journal {path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartupError(f"Another run-batch is writing {path}: wait until it ends.") from None
        self._size = self._read(lines)
        os.ftruncate(self._file, self._size)
        if not self._size:
            self._append(self._head)

    def _read(self, lines: int) -> int:
        """Take over the whole records at the journal's beginning; their size in bytes."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            head = file.readline()
            if not _is_whole(head):
                return 0
            if head != self._head:
                raise StartupError(
                    f"{self._path} is the journal of another input or model: delete it to begin anew, "
                    "or name another output."
                )
            size = len(head)
            for record in file:
                number, _, answer = record.partition(b" ")
                if not number.isdigit() or int(number) >= lines or not _is_whole(answer):
                    break
                self.done[int(number)] = Place(size + len(number) + 1, len(answer))
                size += len(record)
            return size

    def add(self, number: int, answer: bytes) -> None:
        """`answer` is one line of JSON, without its end."""
        prefix = b"%d " % number
        self.done[number] = Place(self._size + len(prefix), len(answer) + 1)
        self._append(prefix + answer + b"\n")

    def _append(self, record: bytes) -> None:
        try:
            written = os.pwrite(self._file, record, self._size)
            while written < len(record):
                written += os.pwrite(self._file, record[written:], self._size + written)
        except OSError as error:
            raise StartupError(f"The journal {self._path} cannot be written: {error.strerror}") from None
        self._size += len(record)

    def write_output(self, path: Path) -> None:
        """All answers, in the order of their lines, under their name at once; the journal is gone then."""
        beside = path.with_name(path.name + ".partial")
        try:
            with beside.open("wb") as out:
                for _, place in sorted(self.done.items()):
                    out.write(os.pread(self._file, place.size, place.offset))
                out.flush()
                os.fsync(out.fileno())
            beside.replace(path)
            self._path.unlink()
        except OSError as error:
            raise StartupError(f"--output-file {path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._file)


def _is_whole(record: bytes) -> bool:
    """An object on a line of its own, as far as can be told: after a power failure there may be anything."""
    try:
        return record.endswith(b"\n") and bool(_RECORD.decode(record))
    except msgspec.DecodeError:
        return False


def line_id(number: int, raw: bytes) -> str:
    """The same at every run."""
    return "batch_req_" + hashlib.sha256(b"%d " % number + raw).hexdigest()[:24]


def output_line(id: str, custom_id: str | None, answer: Answer | LineError) -> bytes:
    """A line of the output as OpenAI's batch files have it."""
    if isinstance(answer, LineError):
        error = {"code": answer.code, "message": str(answer)}
        return msgspec.json.encode({"id": id, "custom_id": custom_id, "response": None, "error": error})
    response = {
        "status_code": answer.status,
        "request_id": answer.headers.get(b"x-request-id", id.encode()).decode("latin-1"),
        "body": _body(answer),
    }
    return msgspec.json.encode({"id": id, "custom_id": custom_id, "response": response, "error": None})


def _body(answer: Answer) -> msgspec.Raw | str:
    """JSON as it is, on one line; anything else as text."""
    if answer.content_type == "application/json":
        try:
            return msgspec.Raw(msgspec.json.format(answer.body, indent=-1))
        except msgspec.DecodeError:
            pass
    return answer.body.decode("utf-8", "replace")
