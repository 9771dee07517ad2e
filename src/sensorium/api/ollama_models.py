"""What Ollama's clients ask about models: GET /api/version, /api/tags, /api/ps and POST /api/show.

What would change the models on this machine is not offered.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from sensorium import __version__
from sensorium.api.context import Context, Entry
from sensorium.api.protocol.ollama import ShowRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.errors import NotOfferedError
from sensorium.errors import MissingFieldError
from sensorium.serving.catalog import LATEST

VERSION = "0.12.6"
"""Of the Ollama whose routes these are: clients ask what they may use."""
_FOREVER = timedelta(days=365 * 100)
_TYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


async def api_version(context: Context, call: Call) -> None:
    await call.respond(msgspec.json.encode({"version": VERSION, "sensorium": __version__}))


async def tags(context: Context, call: Call) -> None:
    rows = [_row(entry, name) for entry in context.entries for name in entry.names]
    await call.respond(msgspec.json.encode({"models": rows}))


async def ps(context: Context, call: Call) -> None:
    """All models are loaded, for as long as the server runs."""
    expires = (datetime.now(UTC) + _FOREVER).isoformat().replace("+00:00", "Z")
    rows = []
    for entry in context.entries:
        ready = entry.model.client.ready
        size = ready.weight_bytes + ready.kv_bytes if ready is not None and ready.device != "cpu" else 0
        more = {"expires_at": expires, "size_vram": size, "context_length": entry.model.max_model_len}
        rows += [_row(entry, name) | more for name in entry.names]
    await call.respond(msgspec.json.encode({"models": rows}))


async def show(context: Context, call: Call) -> None:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, ShowRequest, context.limits, context.unknown, pending, any_type=True)
    name = request.model or request.name
    if not name:
        raise MissingFieldError("model")
    await call.respond(msgspec.json.encode(_shown(context, context.entry(name))))


async def not_offered(context: Context, call: Call) -> None:
    raise NotOfferedError(
        "This server does not change the models on its machine: it serves those that it was started with, which GET "
        "/api/tags lists."
    )


def _row(entry: Entry, name: str) -> dict[str, Any]:
    ready = entry.model.client.ready
    shown = name if ":" in name.rpartition("/")[2] else name + LATEST
    return {
        "name": shown,
        "model": shown,
        "modified_at": datetime.fromtimestamp(entry.model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "size": ready.weight_bytes if ready is not None else 0,
        "digest": hashlib.sha256(entry.name.encode()).hexdigest(),
        "details": _details(entry),
    }


def _details(entry: Entry) -> dict[str, Any]:
    family, count = _family(entry), _parameters(entry)
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count else "",
        "quantization_level": _quantization(entry),
    }


def _family(entry: Entry) -> str:
    checkpoint = entry.model.checkpoint
    return str(checkpoint.config.get("model_type") or checkpoint.architecture)


def _quantization(entry: Entry) -> str:
    model = entry.model
    stored = model.checkpoint.quantization
    if (made := model.client.config.quantization) in ("int8", "int4"):
        return made.upper()
    if stored is not None:
        return stored.layout.upper()
    ready = model.client.ready
    return _TYPES.get(ready.dtype if ready is not None else "", ("", 0))[0]


def _parameters(entry: Entry) -> int:
    """How many there are, where their size tells; else 0."""
    ready = entry.model.client.ready
    size = dict(_TYPES.values()).get(_quantization(entry))
    return ready.weight_bytes // size if ready is not None and size else 0


def _shown(context: Context, entry: Entry) -> dict[str, Any]:
    model, family = entry.model, _family(entry)
    text = model.checkpoint.text
    info: dict[str, Any] = {
        "general.architecture": family,
        "general.basename": entry.name,
        "general.parameter_count": _parameters(entry),
        f"{family}.context_length": model.max_model_len,
    }
    if text is not None:
        info |= {f"{family}.embedding_length": text.hidden_size, f"{family}.block_count": text.num_layers}
    template = model.checkpoint.chat_template if context.server.enable_tokenizer_info_endpoint else None
    return {
        "modelfile": "",
        "parameters": "",
        "template": template or "",
        "details": _details(entry),
        "model_info": info,
        "capabilities": _capabilities(entry),
        "modified_at": _row(entry, entry.name)["modified_at"],
    }


def _capabilities(entry: Entry) -> list[str]:
    model = entry.model
    generates = "generate" in model.tasks
    found = model.format
    has = {
        "completion": generates,
        "vision": generates and "image" in model.processor.modalities,
        "audio": generates and "audio" in model.processor.modalities,
        "tools": generates and found is not None and found.has_tools,
        "thinking": generates and found is not None and found.has_reasoning,
        "embedding": "embed" in model.tasks and model.is_embedder,
    }
    return [name for name, holds in has.items() if holds]
