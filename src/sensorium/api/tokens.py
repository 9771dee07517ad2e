"""POST /tokenize and /detokenize: the tokenizer and the prompt as the model would see them, nothing computed."""

from __future__ import annotations

import asyncio

import msgspec

from sensorium.api.asgi import Call
from sensorium.api.body import read_request
from sensorium.api.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from sensorium.api.service import Entry, Service
from sensorium.errors import ContextLengthError
from sensorium.served import LONG_TEXT, ServedModel


async def tokenize(service: Service, call: Call) -> None:
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        request = await read_request(call, TokenizeRequest, service.limits, service.unknown, pending)
        request.check(service.server)
        entry = service.entry(request.model)
        async with service.flight(call):
            tokens = await _tokens(service, entry, request, call.tenant)
            texts = [entry.model.tokenizer.id_to_token(token) for token in tokens]
            await call.respond(msgspec.json.encode({
                "count": len(tokens), "max_model_len": entry.model.max_model_len, "tokens": tokens,
                "token_strs": texts if request.return_token_strs else None}))


async def _tokens(service: Service, entry: Entry, request: TokenizeRequest, tenant: bytes) -> list[int]:
    model = entry.model
    if request.prompt is not None:
        return await asyncio.to_thread(_encode, model, request.prompt, request.add_special_tokens is not False)
    conversation = request.conversation(model.processor.modalities, service.limits)
    prompt = await model.chat_prompt(
        conversation.messages, conversation.media, add_special_tokens=bool(request.add_special_tokens),
        tenant=tenant, **request.template_options())
    tokens: list[int] = prompt.token_ids.tolist()
    return tokens


def _encode(model: ServedModel, text: str, add_special_tokens: bool) -> list[int]:
    if len(text) > LONG_TEXT and model.tokenizer.fewest_tokens(text) > model.max_model_len:
        raise ContextLengthError(f"The text has {len(text)} characters, more than fit into this model's context of "
                                 f"{model.max_model_len} tokens.", param="prompt")
    return model.tokenizer.encode(model.tokenizer.sanitize(text), add_special_tokens=add_special_tokens)


async def detokenize(service: Service, call: Call) -> None:
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        request = await read_request(call, DetokenizeRequest, service.limits, service.unknown, pending)
        entry = service.entry(request.model)
        async with service.flight(call):
            entry.model.tokenizer.check_ids(request.tokens, param="tokens")
            text = await asyncio.to_thread(entry.model.tokenizer.decode, request.tokens, skip_special_tokens=False)
            await call.respond(msgspec.json.encode({"prompt": text}))
