"""Every failure a client or an operator can see, as one tree; each class knows its HTTP status, type and code.

    SensoriumError
    ├── RequestError (400)                the client must change something; `param` names the field
    │   ├── MissingFieldError (400)         a field that must be there
    │   ├── UnsupportedFieldError (400)     a field that clients know and this server does not have
    │   ├── ContextLengthError (400)        prompt or prompt + max_tokens do not fit
    │   │   └── PromptTooLongError (400)      one prompt, which may be cut
    │   ├── GrammarError (400)              an answer cannot be held to the form that is asked for
    │   ├── MediaError (400)                an image, video or audio item was refused; `code` says why
    │   │   └── UnsupportedModalityError (400)  the model takes no such input
    │   ├── AuthenticationError (401)
    │   ├── ForbiddenError (403)
    │   ├── NotFoundError (404)
    │   │   └── ModelNotFoundError (404)      no model has this name
    │   ├── RequestTimeoutError (408)
    │   ├── BodyTooLargeError (413)
    │   ├── UnsupportedMediaTypeError (415) wrong Content-Type
    │   └── RateLimitError (429)
    ├── ServerError (500)                 our fault; the message never carries a library's text
    │   ├── EngineError (500)               the step that computed this request failed
    │   ├── OverloadedError (503)           queue full; `retry_after_s`
    │   └── UnavailableError (503)          loading, draining, or the engine was lost; `retry_after_s`
    └── StartupError (exit code 2)        the model or a flag is wrong; one clear line for the operator
        └── CheckpointError                 files of the checkpoint

Only these carry text that a client may read. Anything else is answered with `ServerError`'s fixed message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

MAX_WORD, MAX_LINE = 400, 20_000  # characters of a message about a start
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONG = re.compile(rf"\S{{{MAX_WORD},}}")


def _one_line(text: str) -> str:
    escaped = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return _LONG.sub(lambda match: f"{match[0][: MAX_WORD // 4]}…", escaped)[:MAX_LINE]


class SensoriumError(Exception):
    """Root of the tree. `message` is safe to show to whoever caused it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(SensoriumError):
    """The client can mend it. `param` is a path into the body, such as `messages[0].content[1].image_url.url`."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class MissingFieldError(RequestError):
    code = "missing_required_parameter"

    def __init__(self, param: str) -> None:
        super().__init__(f"`{param}` is required.", param=param)


class UnsupportedFieldError(RequestError):
    code = "unsupported_field"


class NotAllowedError(RequestError):
    """A field that the server takes from requests only where its operator says so with `allowed_by`, a flag."""

    def __init__(self, field: str, allowed_by: str) -> None:
        message = f"This server takes no `{field}` from requests: leave it out, or start the server with {allowed_by}."
        super().__init__(message, param=field, code=f"{field}_not_allowed")


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class PromptTooLongError(ContextLengthError):
    """One prompt is longer than it may be; where the request lets the server cut it, it fits."""


class GrammarError(RequestError):
    """The form that an answer is to have cannot be held to: it does not compile, or became too complex on the way."""


class MediaError(RequestError):
    """`code` is one of OpenAI's image codes (`invalid_image_url`, …) or the same code for video or audio."""

    code = "invalid_image"


class UnsupportedModalityError(MediaError):
    """`takes` are the model's modalities beside text, where the client may be told."""

    code = "unsupported_modality"

    def __init__(self, kind: str, *, param: str | None, takes: Iterable[str] | None = None) -> None:
        can = "" if takes is None else f"; it takes {' and '.join(('text', *sorted(takes)))}"
        super().__init__(f"This model takes no {kind} input{can}.", param=param or None)


class AuthenticationError(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFoundError(RequestError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class RequestTimeoutError(RequestError):
    status = 408
    code = "request_timeout"


class BodyTooLargeError(RequestError):
    status = 413
    code = "request_too_large"


class UnsupportedMediaTypeError(RequestError):
    status = 415
    code = "unsupported_content_type"


class RateLimitError(RequestError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerError(SensoriumError):
    def __init__(self, message: str = "The server had an error while processing the request.") -> None:
        super().__init__(message)


class EngineError(ServerError):
    code = "engine_error"


GRAMMAR_NOT_COMPILED = "The form of the answer is too complex for this model's tokenizer: ask for a simpler one."
GRAMMAR_FAILED = (
    "The form of the answer became too complex to go on with: ask for a simpler one, with fewer alternatives and less "
    "that may be left out."
)


def engine_failure(said: str) -> SensoriumError:
    """Of what the engine says of a request that it ends; "" if it says nothing. A form is the request's own."""
    if said in (GRAMMAR_NOT_COMPILED, GRAMMAR_FAILED):
        return GrammarError(said)
    return EngineError(said) if said else EngineError()


class OverloadedError(ServerError):
    status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(ServerError):
    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StartupError(SensoriumError):
    """Raised before anything is served; the command line prints the message, one line, and exits with code 2.

    What files say stands in some messages: their control characters are written as escapes, long words are cut."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class CheckpointError(StartupError):
    pass
