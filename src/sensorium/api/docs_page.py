"""/openapi.json and /docs, made from the table of routes and the request models. The page loads nothing."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic.json_schema import models_json_schema

from sensorium import __version__
from sensorium.api.error_forms import error_form
from sensorium.api.transport.asgi import Call
from sensorium.types import INT32_MAX

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sensorium.api.answers import Content
    from sensorium.api.context import Context
    from sensorium.api.routes import Route

Schemas = Mapping["type[BaseModel]", dict[str, Any]]
"""A reference to each model's schema."""

EVENTS, LINES = "text/event-stream", "application/x-ndjson"
_REF = "#/components/schemas/{model}"
_ID = {"description": "Names the request; as the client sent it, or made here.", "schema": {"type": "string"}}
_RETRY = {
    "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}},
    "Retry-After-Ms": {"description": "The same in milliseconds.", "schema": {"type": "integer"}},
}
_STATUSES = {
    400: "A field is wrong, or the model does not do this: `param` and the message say which and what to change.",
    401: "No key, or a wrong one.",
    403: "A browser's page from another site, a Host that is not this server's, or a key that is no operator's.",
    404: "There is no model of this name.",
    408: "The body came too slowly, or the request took longer than it may.",
    413: "The body is too large.",
    415: "The body is not of the type that this path takes.",
    429: "The key has too many requests in flight.",
    431: "The headers are too large; 414 where it is the path.",
    500: "The server failed.",
    503: "The model is loading, or there is too much to do.",
}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: _RETRY,
    503: _RETRY,
}
_POLICY = (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;"
    "color-scheme:light dark}"
    "h2{font-size:1.05rem;margin:2rem 0 .2rem;font-family:ui-monospace,monospace}p{margin:.2rem 0 .6rem}"
    "table{border-collapse:collapse;font-size:.85rem}td{border-top:1px solid #8884;padding:.15rem .8rem .15rem 0;"
    "vertical-align:top}td:first-child{font-family:ui-monospace,monospace}"
)


async def openapi(context: Context, call: Call) -> None:
    await call.respond((await _descriptions(context))[0])


async def docs(context: Context, call: Call) -> None:
    await call.respond((await _descriptions(context))[1], content_type=b"text/html; charset=utf-8", headers=[_POLICY])


async def _descriptions(context: Context) -> tuple[bytes, bytes]:
    """The document and the page. They take half a second, once."""

    def made() -> tuple[bytes, bytes]:
        document = description(context)
        return msgspec.json.encode(document), page(document).encode()

    if context.descriptions is None:
        context.descriptions = asyncio.ensure_future(asyncio.to_thread(made))
    return await asyncio.shield(context.descriptions)


def description(context: Context) -> dict[str, Any]:
    """The OpenAPI document."""
    routes = [route for route in context.routes if route.documented]
    schema_of, schemas = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation = _operation(route, schema_of)
        operation["responses"] = _responses(route, schema_of, has_keys=bool(context.keys))
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Sensorium", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if context.server.root_path:
        document["servers"] = [{"url": context.server.root_path}]
    if context.keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _schemas(routes: Sequence[Route]) -> tuple[Schemas, dict[str, Any]]:
    """References to the schemas of all bodies and answers, and the schemas."""
    from sensorium.api.answers import ANSWERS, ERRORS

    answers = [form.model for route in routes for form in ANSWERS[route.endpoint.__name__] if form.model is not None]
    bodies = [route.body for route in routes if route.body is not None]
    models: list[type[BaseModel]] = list(dict.fromkeys([*bodies, *answers, *ERRORS.values()]))
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    return {model: {"$ref": _REF.format(model=model.__name__)} for model in models}, schemas.get("$defs", {})


def _responses(route: Route, schema_of: Schemas, *, has_keys: bool) -> dict[str, Any]:
    from sensorium.api.answers import ANSWERS, ERRORS

    form = error_form(route.path)
    error = schema_of[ERRORS[type(form).__name__ if form is not None else "OpenAIErrors"]]
    answers = {"200": _answer(ANSWERS[route.endpoint.__name__], schema_of)}
    return answers | {str(status): _error(status, error) for status in _statuses(route, has_keys=has_keys)}


def _answer(forms: Sequence[Content], schema_of: Schemas) -> dict[str, Any]:
    """The 200, in each of its content types; without any it has no body."""
    content = {
        form.media_type: {"schema": schema_of[form.model] if form.model is not None else {"type": "string"}}
        for form in forms
    }
    found: dict[str, Any] = {"description": "The answer.", "headers": {"X-Request-Id": _ID}}
    if content:
        found["content"] = content
    if EVENTS in content:
        found["description"] = "The answer; with `stream` its events, of which the schema is one event's data."
    if LINES in content:
        found["description"] = "The answer; with `stream` its lines, of which the schema is one."
    return found


def _error(status: int, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": _STATUSES[status],
        "headers": {"X-Request-Id": _ID, **_HEADERS.get(status, {})},
        "content": {"application/json": {"schema": schema}},
    }


def _statuses(route: Route, *, has_keys: bool) -> Iterator[int]:
    """The errors that occur there."""
    names_model = route.body is not None or "{model}" in route.path or route.endpoint.__name__ == "invocations"
    answers_unready = route.needs_engine or route.is_operators or route.endpoint.__name__ in ("readyz", "health")
    for status in _STATUSES:
        if status == 401 and not has_keys:
            continue
        if status in (408, 413, 415, 429) and route.method != "POST":
            continue
        if (status == 404 and not names_model) or (status == 503 and not answers_unready):
            continue
        yield status


def _operation(route: Route, schema_of: Schemas) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": route.summary, "operationId": _operation_id(route)}
    if "{model}" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.body is not None:
        schema = schema_of[route.body]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if route.file is not None:
            upload = {
                "type": "object",
                "required": [route.file],
                "properties": {route.file: {"type": "string", "format": "binary"}},
            }
            operation["requestBody"] = {
                "required": True,
                "content": {"multipart/form-data": {"schema": {"allOf": [schema, upload]}}},
            }
    elif route.endpoint.__name__ == "invocations":
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    return operation


def _operation_id(route: Route) -> str:
    """The endpoint's name; where several paths lead to it, with the version that the path names."""
    version = next((part for part in route.path.split("/") if part in ("v1", "v2")), "")
    several = route.endpoint.__name__ in ("score", "rerank", "cohere_embed") and version
    return f"{route.endpoint.__name__}_{version}" if several else route.endpoint.__name__


def page(document: dict[str, Any]) -> str:
    """The OpenAPI document as plain HTML."""
    schemas = document["components"]["schemas"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Sensorium API</title><style>{_STYLE}</style>"
        "<h1>Sensorium API</h1><p>OpenAI's API and its usual extensions. "
        "Everything is also there below <code>/api/v1</code>.</p>"
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['summary'])}</p>")
            body = operation.get("requestBody")
            if body is not None:
                parts.append(_fields(_merged(next(iter(body["content"].values()))["schema"], schemas)))
    return "".join(parts)


def _merged(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A body's schema, its reference and parts resolved."""
    parts = [
        schemas[part["$ref"].rpartition("/")[2]] if "$ref" in part else part for part in schema.get("allOf", [schema])
    ]
    return {
        "required": [name for part in parts for name in part.get("required", ())],
        "properties": {name: field for part in parts for name, field in part.get("properties", {}).items()},
    }


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    fields = sorted(schema["properties"].items(), key=lambda item: (item[0] not in required, item[0]))
    rows = [
        f"<tr><td>{html.escape(name)}<td>{html.escape(_kind(field))}<td>{'required' if name in required else ''}"
        for name, field in fields
    ]
    return f"<table>{''.join(rows)}</table>"


def _kind(field: dict[str, Any]) -> str:
    """A field's type and bounds in a few words."""
    choices = [choice for choice in field.get("anyOf", field.get("oneOf", ())) if choice.get("type") != "null"]
    if choices:
        return " or ".join(dict.fromkeys(map(_kind, choices)))
    if "$ref" in field:
        return "object"
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"array of {_kind(field.get('items', {}))}"
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    return f"{kind} {low} to {high}" if low is not None and high is not None and high < INT32_MAX else kind
