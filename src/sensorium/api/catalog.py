"""GET /v1/models: what is served and in which state; POST /v1/models/load and /unload, for operators."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from sensorium.api.context import Context
from sensorium.api.protocol.models import NamedModel
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.errors import RequestError
from sensorium.serving.catalog import CatalogEntry
from sensorium.system.processes import rss_bytes


async def models(context: Context, call: Call) -> None:
    rows = []
    for entry in context.catalog.entries:
        rows += [_row(entry, name, call) for name in (*entry.names, *entry.adapters.names)]
    ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]}
    await call.respond(msgspec.json.encode({"object": "list", "data": rows, "has_more": False, **ends}))


async def model(context: Context, call: Call) -> None:
    name = call.path.removeprefix("/v1/models/")
    await call.respond(msgspec.json.encode(_row(context.catalog.find(name), name, call)))


async def load_model(context: Context, call: Call) -> None:
    """Answered when it is loaded, or with why it cannot be."""
    name = await _named(context, call)
    entry = context.catalog.find(name)
    await context.catalog.load(entry)
    await call.respond(msgspec.json.encode(_row(entry, name, call)))


async def unload_model(context: Context, call: Call) -> None:
    """Answered when its requests have ended and its memory is given back."""
    name = await _named(context, call)
    entry = context.catalog.find(name)
    if not await context.catalog.unload(entry):
        raise RequestError(f"The model {name!r} stays: it is pinned, or it is the server's only one.", param="model")
    await call.respond(msgspec.json.encode(_row(entry, name, call)))


async def _named(context: Context, call: Call) -> str:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        return (await read_request(call, NamedModel, context.limits, context.unknown, pending)).model


def memory_of(entry: CatalogEntry) -> dict[str, int]:
    """Bytes that a model takes: weights, KV cache, adapters, and what its engine's process has in memory."""
    served = entry.served
    if served is None or served.client.ready is None:
        return {}
    ready, pid = served.client.ready, getattr(served.client, "pid", None)
    resident = rss_bytes(pid) if pid is not None else 0
    return {
        "weights": ready.weight_bytes,
        "kv_cache": ready.kv_bytes,
        "adapters": entry.adapters.nbytes,
        "resident": resident,
    }


def _row(entry: CatalogEntry, name: str, call: Call) -> dict[str, object]:
    """In OpenAI's words, vLLM's, Anthropic's and Mistral's, and where it stands. The last two want different things of
    the same name; Anthropic's clients say who they are."""
    state, (phase, fraction) = entry.state, entry.progress
    adapter = entry.adapters.find(name)
    created = entry.created if adapter is None else adapter.created
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "sensorium",
        "root": entry.name if adapter is None else adapter.path,
        "parent": None if adapter is None else entry.name,
        "max_model_len": entry.max_model_len,
        "tasks": list(entry.tasks),
        "modalities": ["text", *entry.modalities],
        "state": state,
        "error": entry.failure or None,
        "loading": {"phase": phase, "progress": fraction} if state == "loading" else None,
        "memory": memory_of(entry) or None,
        "adapters": list(entry.adapters.names) if adapter is None else [],
        **_of_type(entry, call),
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": entry.max_model_len,
        "max_tokens": entry.max_model_len,
    }


def _of_type(entry: CatalogEntry, call: Call) -> dict[str, object]:
    """Mistral's clients drop a model of another type or without these capabilities. What is not known before the model
    is loaded is false until then."""
    if call.header(b"anthropic-version"):
        return {"type": "model"}
    found = None if entry.served is None else entry.served.format
    capabilities = {
        "completion_chat": "generate" in entry.tasks,
        "function_calling": found is not None and found.has_tools,
        "reasoning": found is not None and found.has_reasoning,
        "vision": "image" in entry.modalities,
        "audio": "audio" in entry.modalities,
        "classification": "classify" in entry.tasks,
    }
    return {"type": "base", "capabilities": capabilities, "max_context_length": entry.max_model_len}
