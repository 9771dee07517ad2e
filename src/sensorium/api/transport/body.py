"""Reads bodies under limits; JSON is parsed once. Nothing is believed before its size is known to be allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.common import Body, UnknownFields
from sensorium.api.protocol.validation import parse_json
from sensorium.api.transport.asgi import Call, ClientGone, Receive
from sensorium.api.transport.json_bounds import JsonBounds, TooManyValuesError
from sensorium.config import Limits
from sensorium.errors import BodyTooLargeError, RequestError, RequestTimeoutError, UnsupportedMediaTypeError

Request = TypeVar("Request", bound=Body)
_TINY_BYTES = 512
"""Pieces smaller than this count against `max_body_messages`; an ordinary network's packets are larger."""


async def read_request(
    call: Call,
    model: type[Request],
    limits: Limits,
    unknown: UnknownFields,
    pending: PendingBody,
    *,
    any_type: bool = False,
) -> Request:
    """The body of a call as a request model. Its bytes are held of `pending` until the caller releases them.
    `any_type`: it is JSON, whatever it is called."""
    if not any_type:
        check_json_type(call)
    body, bounds = await read_json(call, limits, pending)
    if bounds.is_small:
        request = parse_json(model, body, unknown)
    else:
        request = await pending.in_turn(partial(parse_json, model, body, unknown))
    call.take_name(request.request_id)
    return request


async def read_json(call: Call, limits: Limits, pending: PendingBody) -> tuple[bytearray, JsonBounds]:
    """The bytes of a JSON body, and what they are made of."""
    bounds = JsonBounds(limits)
    body = bytearray()

    def take(piece: bytes) -> None:
        pending.add(len(piece))
        body.extend(piece)
        bounds.feed(piece)

    try:
        await receive_body(call.receive, limits.max_body_bytes, limits, take, declared_bytes=declared_length(call))
        bounds.finish()
    except TooManyValuesError as error:
        raise await pending.in_turn(partial(error.placed, body)) from None
    return body, bounds


def check_json_type(call: Call) -> None:
    values = call.headers(b"content-type")
    kind, _, parameters = (values[0] if values else b"").decode("latin-1").lower().partition(";")
    if len(values) != 1 or kind.strip() != "application/json":
        raise UnsupportedMediaTypeError("The body must be JSON: send `Content-Type: application/json`.")
    if call.header(b"content-encoding") not in (None, b"identity"):
        raise UnsupportedMediaTypeError("Compressed bodies are not accepted: leave Content-Encoding out.")
    name, _, charset = parameters.partition("=")
    if name.strip() == "charset" and charset.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
        raise RequestError("The body must be UTF-8.", code="unsupported_charset")


def declared_length(call: Call) -> int | None:
    value = call.header(b"content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise RequestError("Content-Length is not a number.", code="invalid_content_length")
    return int(value)


async def receive_body(
    receive: Receive,
    max_bytes: int,
    limits: Limits,
    take: Callable[[bytes], None],
    *,
    declared_bytes: int | None = None,
) -> None:
    """Give every piece of a body to `take`, which may refuse it, as it comes.

    Raises the error for the limit that was broken, as soon as it is.
    """
    if declared_bytes is not None and declared_bytes > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            await _receive_all(receive, max_bytes, limits.max_body_messages, take)
    except TimeoutError:
        raise RequestTimeoutError(f"The body was not complete after {limits.body_timeout_s:g} seconds.") from None


async def _receive_all(receive: Receive, max_bytes: int, max_pieces: int, take: Callable[[bytes], None]) -> None:
    size_bytes = tiny_pieces = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        size_bytes += len(piece)
        tiny_pieces += len(piece) < _TINY_BYTES
        if size_bytes > max_bytes:
            raise _too_large(max_bytes)
        if tiny_pieces > max_pieces:
            raise BodyTooLargeError("The body came in too many small pieces; send larger ones.")
        take(piece)
        if not message.get("more_body", False):
            return


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {max_bytes} bytes.")
