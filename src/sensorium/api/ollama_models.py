"""What Ollama's clients ask about models: GET /api/version, /api/tags, /api/ps and POST /api/show.

What would change the models on this machine is not offered.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from sensorium import __version__
from sensorium.api.context import Context
from sensorium.api.protocol.ollama import ShowRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.errors import NotOfferedError
from sensorium.errors import MissingFieldError
from sensorium.serving.catalog import LATEST, CatalogEntry
from sensorium.types import EngineReady

VERSION = "0.12.6"
"""Of the Ollama whose routes these are: clients ask what they may use."""
_FOREVER = timedelta(days=365 * 100)
_TYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


async def api_version(context: Context, call: Call) -> None:
    await call.respond(msgspec.json.encode({"version": VERSION, "sensorium": __version__}))


async def tags(context: Context, call: Call) -> None:
    rows = [_row(entry, name) for entry in context.catalog.entries for name in entry.names]
    await call.respond(msgspec.json.encode({"models": rows}))


async def ps(context: Context, call: Call) -> None:
    """What is loaded, and until when if nobody asks for it."""
    rows = []
    for entry in context.catalog.entries:
        if entry.served is None:
            continue
        left_s = context.catalog.residents.expires_in_s(entry)
        left = _FOREVER if left_s is None else timedelta(seconds=left_s)
        ready = entry.served.client.ready
        more = {
            "expires_at": (datetime.now(UTC) + left).isoformat().replace("+00:00", "Z"),
            "size_vram": ready.weight_bytes + ready.kv_bytes if ready is not None and ready.device != "cpu" else 0,
            "context_length": entry.max_model_len,
        }
        rows += [_row(entry, name) | more for name in entry.names]
    await call.respond(msgspec.json.encode({"models": rows}))


async def show(context: Context, call: Call) -> None:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, ShowRequest, context.limits, context.unknown, pending, any_type=True)
    name = request.model or request.name
    if not name:
        raise MissingFieldError("model")
    await call.respond(msgspec.json.encode(_shown(context, context.catalog.find(name))))


async def not_offered(context: Context, call: Call) -> None:
    raise NotOfferedError(
        "This server does not change the models on its machine: it serves those that it was started with, which GET "
        "/api/tags lists."
    )


def _row(entry: CatalogEntry, name: str) -> dict[str, Any]:
    shown = name if ":" in name.rpartition("/")[2] else name + LATEST
    return {
        "name": shown,
        "model": shown,
        "modified_at": datetime.fromtimestamp(entry.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "size": _weight_bytes(entry),
        "digest": hashlib.sha256(entry.name.encode()).hexdigest(),
        "details": _details(entry),
    }


def _details(entry: CatalogEntry) -> dict[str, Any]:
    family, count = _family(entry), _parameters(entry)
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count else "",
        "quantization_level": _quantization(entry),
    }


def _ready(entry: CatalogEntry) -> EngineReady | None:
    return None if entry.served is None else entry.served.client.ready


def _weight_bytes(entry: CatalogEntry) -> int:
    """Of the weights as they are loaded, else of their files."""
    if (ready := _ready(entry)) is not None:
        return ready.weight_bytes
    return 0 if entry.outline is None else entry.outline.weight_bytes


def _family(entry: CatalogEntry) -> str:
    checkpoint = entry.checkpoint
    return "" if checkpoint is None else str(checkpoint.config.get("model_type") or checkpoint.architecture)


def _quantization(entry: CatalogEntry) -> str:
    served, checkpoint = entry.served, entry.checkpoint
    if served is not None and (made := served.client.config.quantization) in ("int8", "int4"):
        return made.upper()
    if checkpoint is None:
        return ""
    if checkpoint.quantization is not None:
        return checkpoint.quantization.layout.upper()
    ready = _ready(entry)
    return _TYPES.get(ready.dtype if ready is not None else checkpoint.dtype, ("", 0))[0]


def _parameters(entry: CatalogEntry) -> int:
    """How many there are, where their size tells; else 0."""
    size = dict(_TYPES.values()).get(_quantization(entry))
    return _weight_bytes(entry) // size if size else 0


def _shown(context: Context, entry: CatalogEntry) -> dict[str, Any]:
    checkpoint, family = entry.checkpoint, _family(entry)
    text = None if checkpoint is None else checkpoint.text
    info: dict[str, Any] = {
        "general.architecture": family,
        "general.basename": entry.name,
        "general.parameter_count": _parameters(entry),
        f"{family}.context_length": entry.max_model_len,
    }
    if text is not None:
        info |= {f"{family}.embedding_length": text.hidden_size, f"{family}.block_count": text.num_layers}
    template = ""
    if checkpoint is not None and context.server.enable_tokenizer_info_endpoint:
        template = checkpoint.chat_template or ""
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": _details(entry),
        "model_info": info,
        "capabilities": _capabilities(entry),
        "modified_at": _row(entry, entry.name)["modified_at"],
    }


def _capabilities(entry: CatalogEntry) -> list[str]:
    """Of one that is not loaded what its files say: calls and thoughts are known once its template has been run."""
    served, generates = entry.served, "generate" in entry.tasks
    found = None if served is None else served.format
    has = {
        "completion": generates,
        "vision": generates and "image" in entry.modalities,
        "audio": generates and "audio" in entry.modalities,
        "tools": generates and found is not None and found.has_tools,
        "thinking": generates and found is not None and found.has_reasoning,
        "embedding": "embed" in entry.tasks and (not generates if served is None else served.is_embedder),
    }
    return [name for name, holds in has.items() if holds]
