"""POST /tokenize and /detokenize: the tokenizer and the prompt as the model would see them, nothing computed."""

from __future__ import annotations

import asyncio

import msgspec

from sensorium.api.context import Entry, Service
from sensorium.api.output_format import check_tools
from sensorium.api.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request


async def tokenize(service: Service, call: Call) -> None:
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        request = await read_request(call, TokenizeRequest, service.limits, service.unknown, pending)
        request.check(service.server)
        entry = service.entry(request.model)
        with entry.admission.admit(1):
            async with service.flight(call):
                tokens = await _tokens(service, call, entry, request)
                texts = [entry.model.tokenizer.id_to_token(token) for token in tokens]
                await call.respond(
                    msgspec.json.encode(
                        {
                            "count": len(tokens),
                            "max_model_len": entry.model.max_model_len,
                            "tokens": tokens,
                            "token_strs": texts if request.return_token_strs else None,
                        }
                    )
                )


async def _tokens(service: Service, call: Call, entry: Entry, request: TokenizeRequest) -> list[int]:
    model = entry.model
    if request.prompt is not None:
        return await model.prompts.encode(
            request.prompt, add_special_tokens=request.add_special_tokens is not False, tenant=call.turn
        )
    conversation = request.conversation(model.processor.modalities, service.limits)
    check_tools(entry, request, conversation)
    prompt = await model.prompts.chat_prompt(
        conversation.messages,
        conversation.media,
        add_special_tokens=bool(request.add_special_tokens),
        tenant=call.turn,
        salt=service.salts.of(call.tenant),
        tools=request.tool_objects,
        **request.template_options(),
    )
    tokens: list[int] = prompt.token_ids.tolist()
    return tokens


async def detokenize(service: Service, call: Call) -> None:
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        request = await read_request(call, DetokenizeRequest, service.limits, service.unknown, pending)
        entry = service.entry(request.model)
        async with service.flight(call):
            entry.model.tokenizer.check_ids(request.tokens, param="tokens")
            text = await asyncio.to_thread(entry.model.tokenizer.decode, request.tokens, skip_special_tokens=False)
            await call.respond(msgspec.json.encode({"prompt": text}))
