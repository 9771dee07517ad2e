"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, for operators."""

from __future__ import annotations

from functools import partial

from sensorium.api.context import Context
from sensorium.api.protocol.models import LoadAdapter, UnloadAdapter
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.errors import ModelNotFoundError

TEXT = b"text/plain; charset=utf-8"


async def load_adapter(context: Context, call: Call) -> None:
    """Answered when requests may name it. Its base is loaded first if need be."""
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, LoadAdapter, context.limits, context.unknown, pending)
    async with context.acquire(request.base_model_name) as entry:
        name, listed = request.lora_name, entry.listed
        await listed.adapters.add(
            entry.model.client,
            name,
            request.lora_path,
            replaces=request.load_inplace,
            make_room=partial(context.catalog.residents.make_room, listed),
            check_name=partial(context.catalog.check_adapter_name, listed),
        )
    await call.respond(f"Success: LoRA adapter '{name}' added successfully.".encode(), content_type=TEXT)


async def unload_adapter(context: Context, call: Call) -> None:
    """Its requests in flight go on to their ends."""
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, UnloadAdapter, context.limits, context.unknown, pending)
    name = request.lora_name
    listed = context.catalog.owner(name)
    if listed is None or listed.adapters.find(name) is None:
        raise ModelNotFoundError(f"The adapter {name!r} does not exist (GET /v1/models).", param="lora_name")
    listed.adapters.remove(listed.client, name)
    await call.respond(f"Success: LoRA adapter '{name}' removed successfully.".encode(), content_type=TEXT)
