"""Parses a body once and turns pydantic's findings into one sentence of ours: which field, and what it must be.

No text of pydantic reaches the client: every error type that the request models can produce has its own sentence here,
and the rest share a fixed one.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import ValidationError

from sensorium.api.protocol.common import Body, UnknownFields
from sensorium.errors import RequestError

Request = TypeVar("Request", bound=Body)
_MAX_PARAM_CHARS = 200
_POSITION = re.compile(r"line (\d+) column (\d+)")

_SENTENCES: dict[str, str] = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "is too large a number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be an array",
    "tuple_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be one of {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "has characters that are not allowed there",
    "string_unicode": "is not valid Unicode",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "none_required": "must be null",
}


def parse_json(model: type[Request], body: bytes | bytearray, unknown: UnknownFields) -> Request:
    """The request that a body describes; RequestError where it does not describe one."""
    if not body:
        raise RequestError("The body is empty; send a JSON object.", code="invalid_json")
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise request_error(error) from None
    except RecursionError:
        raise RequestError("The body is nested too deeply.", code="invalid_json") from None
    request.check_fields(unknown)
    return request


def request_error(error: ValidationError) -> RequestError:
    """The first finding, as ours."""
    finding = error.errors(include_url=False, include_input=False)[0]
    kind: str = finding["type"]
    context: dict[str, Any] = finding.get("ctx", {})
    param = param_path(finding["loc"]) or None
    if kind == "json_invalid":
        found = _POSITION.search(str(context.get("error", "")))
        where = f" (line {found[1]}, column {found[2]})" if found else ""
        return RequestError(f"The body is not valid JSON{where}.", code="invalid_json")
    if kind == "own":  # raised by our own validators, in our own words
        return RequestError(f"`{param}` {finding['msg']}.", param=param)
    sentence = _SENTENCES.get(kind, "has a wrong value or form").format_map(context)
    if context.get("min_length") == 1:
        sentence = "must not be empty"
    if param is None:
        return RequestError(f"The body {sentence}.")
    code = "missing_required_parameter" if kind == "missing" else None
    return RequestError(f"`{param}` {sentence}.", param=param, code=code)


def param_path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "<parts>", 1) -> messages[0].content[1]; tags of unions stand in angle brackets."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (step.startswith("<") and step.endswith(">")):
            path += f".{step}" if path else step
    return path[:_MAX_PARAM_CHARS]
