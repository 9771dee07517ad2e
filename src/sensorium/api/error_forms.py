"""Which API a path belongs to, as far as errors go: known before routing, since what guards refuse has a form too."""

from __future__ import annotations

from typing import Any

import msgspec

from sensorium.api.protocol.other_servers import NO_THREADS
from sensorium.api.transport.asgi import Call, ErrorForm, Header
from sensorium.api.transport.sse import named_event
from sensorium.errors import RequestError, SensoriumError


def _message(error: SensoriumError) -> str:
    """For APIs whose errors have no place of their own for the field."""
    param = error.param if isinstance(error, RequestError) else None
    return error.message if not param or param in error.message else f"{param}: {error.message}"


class AnthropicErrors:
    """As Anthropic's Messages API has them. Every answer names the request in `request-id`."""

    def body(self, error: SensoriumError, call: Call) -> bytes:
        return msgspec.json.encode({**self._object(error), "request_id": call.request_id})

    def headers(self, call: Call) -> list[Header]:
        return [(b"request-id", call.request_id.encode())]

    def event(self, error: SensoriumError, call: Call) -> bytes:
        return named_event(self._object(error))

    def _object(self, error: SensoriumError) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        found: dict[str, Any] = {"type": kind, "message": _message(error)}
        if error.code == NO_THREADS:
            found["details"] = {"error_code": NO_THREADS, "unsupported": ["thread"]}
        return {"type": "error", "error": found}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class OllamaErrors:
    """As Ollama has them; in a stream, a line of its own."""

    def body(self, error: SensoriumError, call: Call) -> bytes:
        return msgspec.json.encode({"error": _message(error)})

    def headers(self, call: Call) -> list[Header]:
        return []

    def event(self, error: SensoriumError, call: Call) -> bytes:
        return self.body(error, call) + b"\n"


_ANTHROPIC: ErrorForm = AnthropicErrors()
_OLLAMA: ErrorForm = OllamaErrors()
OLLAMA_PATHS = frozenset(
    f"/api/{name}"
    for name in "version tags ps show chat generate embed embeddings create pull push copy delete".split()
)
BLOBS = "/api/blobs/"


def error_form(path: str) -> ErrorForm | None:
    """None for OpenAI's."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return _ANTHROPIC
    return _OLLAMA if path in OLLAMA_PATHS or path.startswith(BLOBS) else None
