"""What the server says about itself: health, models, version, metrics."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from sensorium import __version__
from sensorium.api.context import Context, Entry
from sensorium.api.metrics import CONTENT_TYPE, EngineNumbers
from sensorium.api.transport.asgi import Call
from sensorium.errors import NotFoundError


async def livez(context: Context, call: Call) -> None:
    """The process answers, whatever the model does."""
    await call.respond(b'{"status":"alive"}')


async def readyz(context: Context, call: Call) -> None:
    """Requests are answered: loaded, engine there, not draining."""
    context.catalog.check_all_ready()
    await call.respond(b'{"status":"ready"}')


async def health(context: Context, call: Call) -> None:
    """As other servers have it: an empty 200, or 503."""
    context.catalog.check_all_ready()
    await call.respond(b"")


async def load(context: Context, call: Call) -> None:
    """As vLLM has it: how many requests are being worked on."""
    await call.respond(msgspec.json.encode({"server_load": len(context.in_flight)}))


async def tokenizer_info(context: Context, call: Call) -> None:
    """As vLLM has it: tokenizer_config.json with the chat template, of the first model."""
    if not context.server.enable_tokenizer_info_endpoint:
        raise NotFoundError(
            "There is nothing at this path; the operator can open it with --enable-tokenizer-info-endpoint."
        )
    checkpoint = context.entries[0].model.checkpoint
    template = {} if checkpoint.chat_template is None else {"chat_template": checkpoint.chat_template}
    await call.respond(msgspec.json.encode({"tokenizer_class": None, **checkpoint.tokenizer_config, **template}))


async def version(context: Context, call: Call) -> None:
    await call.respond(msgspec.json.encode({"version": __version__}))


async def models(context: Context, call: Call) -> None:
    rows = [_row(entry, name) for entry in context.entries for name in entry.names]
    ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]}
    await call.respond(msgspec.json.encode({"object": "list", "data": rows, "has_more": False, **ends}))


async def model(context: Context, call: Call) -> None:
    name = call.path.removeprefix("/v1/models/")
    entry = context.entry(name)
    await call.respond(msgspec.json.encode(_row(entry, name)))


def _row(entry: Entry, name: str) -> dict[str, object]:
    """In OpenAI's words, vLLM's and Anthropic's."""
    created = entry.model.created
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "sensorium",
        "root": entry.name,
        "parent": None,
        "max_model_len": entry.model.max_model_len,
        "tasks": list(entry.model.tasks),
        "modalities": ["text", *sorted(entry.model.processor.modalities)],
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": entry.model.max_model_len,
        "max_tokens": entry.model.max_model_len,
    }


async def metrics(context: Context, call: Call) -> None:
    engines = {
        entry.name: EngineNumbers(
            entry.model.client.stats, entry.model.client.ready, entry.listed.state, entry.listed.users
        )
        for entry in context.entries
    }
    await call.respond(context.metrics.render(engines), content_type=CONTENT_TYPE)
