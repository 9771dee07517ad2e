"""The one place that turns an exception into what a client reads: OpenAI's error body, always the same four keys, or
what the call's `ErrorForm` makes of it.

Only `SensoriumError` carries text for clients; everything else becomes the fixed text of `ServerError`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from sensorium.api.transport.asgi import Call, ClientGone, Header
from sensorium.errors import RequestError, SensoriumError, ServerError

log = logging.getLogger("sensorium.api")


class MethodNotAllowedError(RequestError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class NotOfferedError(RequestError):
    """What the API has, and no server of this kind does."""

    status = 501
    code = "not_offered"


class HeadersTooLargeError(RequestError):
    status = 431
    code = "headers_too_large"


class UrlTooLongError(RequestError):
    status = 414
    code = "url_too_long"


def error_object(error: SensoriumError) -> dict[str, Any]:
    """{message, type, param, code}"""
    param = error.param if isinstance(error, RequestError) else None
    return {"message": error.message, "type": error.type, "param": param, "code": error.code}


def error_body(error: SensoriumError) -> bytes:
    return msgspec.json.encode({"error": error_object(error)})


class OpenAIErrors:
    """An `ErrorForm`: OpenAI's object, and in a stream an event of it."""

    def body(self, error: SensoriumError, call: Call) -> bytes:
        return error_body(error)

    def headers(self, call: Call) -> list[Header]:
        return []

    def event(self, error: SensoriumError, call: Call) -> bytes:
        return b"data: " + error_body(error) + b"\n\ndata: [DONE]\n\n"


OPENAI = OpenAIErrors()


def error_headers(error: SensoriumError) -> list[Header]:
    """What clients act upon: when to come back, how to authenticate, which methods there are."""
    headers: list[Header] = []
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()))
        headers.append((b"retry-after-ms", str(int(retry_after_s * 1000)).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", error.allow.encode()))
    return headers


def client_view(error: Exception, call: Call) -> SensoriumError:
    """The error to show. What is not ours is logged with the request's id and hidden behind fixed words."""
    if isinstance(error, SensoriumError):
        return error
    log.error("request %s failed: %s", call.request_id, type(error).__name__, exc_info=error)
    return ServerError(f"The server had an error while processing the request. Its id is {call.request_id}.")


@asynccontextmanager
async def errors_answered(call: Call) -> AsyncIterator[None]:
    """The HTTP edge: whatever is raised inside becomes an answer."""
    try:
        yield
    except Exception as error:
        await answer_error(call, error)


async def answer_error(call: Call, error: Exception) -> None:
    """Answer with an error in whatever form is left: a status, an event on a running stream, or nothing."""
    if isinstance(error, ClientGone):
        call.status = call.status or 499
        return
    shown = client_view(error, call)
    form = call.errors or OPENAI
    if call.streaming:
        await call.send({"type": "http.response.body", "body": form.event(shown, call)})
    elif not call.status:
        await call.respond(form.body(shown, call), status=shown.status, headers=error_headers(shown))
