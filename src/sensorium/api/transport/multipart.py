"""Reads a multipart form while it arrives: one file in memory, a few short fields, nothing on disk.

The file's name is never looked at. Whatever is too large, too many or malformed ends the request at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import declared_length, receive_body
from sensorium.config import Limits
from sensorium.errors import BodyTooLargeError, RequestError, UnsupportedMediaTypeError

MAX_FIELDS = 64
MAX_FIELD_BYTES = 64 * 1024
MAX_HEADERS = 8
MAX_HEADER_BYTES = 8 * 1024
"""Of one part: a file name of 4 KiB is still let by."""
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{1,70}")


@dataclass(slots=True)
class Form:
    """`fields` have their values as they came; `file` is None if there was none."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    file: bytes | None = None


async def read_form(call: Call, limits: Limits, file_name: str, on_bytes: Callable[[int], None]) -> Form:
    """The form of a call, whose one file is the field `file_name`."""
    reader = FormReader(boundary_of(call), file_name)

    def take(piece: bytes) -> None:
        on_bytes(len(piece))
        reader.feed(piece)

    await receive_body(call.receive, limits.max_upload_bytes, limits, take, declared_bytes=declared_length(call))
    return reader.finish()


def boundary_of(call: Call) -> bytes:
    """The boundary that a call names; RequestError unless its body is a form."""
    values = call.headers(b"content-type")
    kind, options = parse_options_header(values[0] if len(values) == 1 else b"")
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data":
        raise UnsupportedMediaTypeError("The body must be a form: send `Content-Type: multipart/form-data`.")
    if call.header(b"content-encoding") not in (None, b"identity"):
        raise UnsupportedMediaTypeError("Compressed bodies are not accepted: leave Content-Encoding out.")
    if not _BOUNDARY.fullmatch(boundary):
        raise RequestError("The form's boundary is missing or malformed.", code="invalid_multipart")
    return boundary


class FormReader:
    """Feed it the body's pieces in order; the parser's callbacks fill the form."""

    def __init__(self, boundary: bytes, file_name: str) -> None:
        self._file_name = file_name
        self._form = Form()
        self._num_parts = 0
        self._ended = False
        self._header = (bytearray(), bytearray())  # name and value of the header that is being read
        self._disposition = b""
        self._name = ""
        self._content = bytearray()
        self._max_bytes = 0  # of the part; 0 is as many as the body may have
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._on_header_name,
                "on_header_value": self._on_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._on_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def feed(self, piece: bytes) -> None:
        try:
            self._parser.write(piece)
        except FormParserError:
            raise RequestError("The body is not a valid form.", code="invalid_multipart") from None

    def finish(self) -> Form:
        if not self._ended:
            raise RequestError("The form is not complete: its last boundary is missing.", code="invalid_multipart")
        return self._form

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise RequestError(f"The form has more than {MAX_FIELDS} fields.", code="invalid_multipart")
        self._disposition = b""
        self._content = bytearray()

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _begin_content(self) -> None:
        kind, options = parse_options_header(self._disposition)
        try:
            self._name = options.get(b"name", b"").decode()
        except UnicodeDecodeError:
            self._name = ""
        if kind != b"form-data" or not 0 < len(self._name) <= 64 or not self._name.isprintable():
            raise RequestError("A part of the form has no name.", code="invalid_multipart")
        is_file = self._name == self._file_name
        if is_file and self._form.file is not None:
            raise RequestError(f"`{self._file_name}` is given twice.", param=self._file_name)
        self._max_bytes = 0 if is_file else MAX_FIELD_BYTES

    def _on_content(self, data: bytes, start: int, end: int) -> None:
        self._content += memoryview(data)[start:end]
        if self._max_bytes and len(self._content) > self._max_bytes:
            raise BodyTooLargeError(f"A field of the form has more than {self._max_bytes} bytes.")

    def _end_part(self) -> None:
        if not self._max_bytes:
            self._form.file = bytes(self._content)
        else:
            try:
                self._form.fields.setdefault(self._name, []).append(self._content.decode())
            except UnicodeDecodeError:
                raise RequestError(f"`{self._name}` is not valid UTF-8.", param=self._name) from None
        self._content = bytearray()

    def _end(self) -> None:
        self._ended = True
