"""What the server says about itself: health, models, version, metrics."""

from __future__ import annotations

import msgspec

from sensorium import __version__
from sensorium.api.catalog import memory_of
from sensorium.api.context import Context
from sensorium.api.metrics import CONTENT_TYPE, EngineNumbers
from sensorium.api.transport.asgi import Call
from sensorium.errors import NotFoundError, UnavailableError
from sensorium.types import EngineStats


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
    checkpoint = context.catalog.entries[0].checkpoint
    if checkpoint is None:
        raise UnavailableError("The model is not there yet.")
    template = {} if checkpoint.chat_template is None else {"chat_template": checkpoint.chat_template}
    await call.respond(msgspec.json.encode({"tokenizer_class": None, **checkpoint.tokenizer_config, **template}))


async def version(context: Context, call: Call) -> None:
    await call.respond(msgspec.json.encode({"version": __version__}))


async def metrics(context: Context, call: Call) -> None:
    await call.respond(context.metrics.render(engine_numbers(context)), content_type=CONTENT_TYPE)


def engine_numbers(context: Context) -> dict[str, EngineNumbers]:
    """The latest gauges of every model."""
    engines = {}
    for listed in context.catalog.entries:
        client = listed.client
        engines[listed.name] = EngineNumbers(
            EngineStats() if client is None else client.stats,
            None if client is None else client.ready,
            listed.state,
            listed.users,
            memory_of(listed).get("resident", 0),
            tuple(one.name for one in listed.adapters.listed if one.users),
            len(listed.adapters.listed),
        )
    return engines
