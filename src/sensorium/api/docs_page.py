"""/openapi.json and /docs, made from the table of routes and the request models. The page loads nothing."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic.json_schema import models_json_schema

from sensorium import __version__
from sensorium.api.transport.asgi import Call
from sensorium.types import INT32_MAX

if TYPE_CHECKING:
    from sensorium.api.context import Context
    from sensorium.api.routes import Route

_REF = "#/components/schemas/{model}"
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
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
    await call.respond(msgspec.json.encode(description(context)))


async def docs(context: Context, call: Call) -> None:
    await call.respond(page(description(context)).encode(), content_type=b"text/html; charset=utf-8", headers=[_POLICY])


def description(context: Context) -> dict[str, Any]:
    """The OpenAPI document."""
    bodies = [(route.body, "validation") for route in context.routes if route.body is not None]
    _, schemas = models_json_schema(bodies, ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in (route for route in context.routes if route.documented):
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Sensorium", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), "Error": _ERROR}},
    }
    if context.server.root_path:
        document["servers"] = [{"url": context.server.root_path}]
    if context.keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(route: Route) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model="Error")}
    error = {"description": "What was wrong.", "content": {"application/json": {"schema": schema}}}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": _operation_id(route),
        "responses": {"200": {"description": "The answer."}, "default": error},
    }
    if "{model}" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.body is not None:
        schema = {"$ref": _REF.format(model=route.body.__name__)}
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
        "properties": {name: field for part in parts for name, field in part["properties"].items()},
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
