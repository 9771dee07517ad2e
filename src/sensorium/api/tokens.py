"""POST /tokenize and /detokenize: the tokenizer and the prompt as the model would see them, nothing computed."""

from __future__ import annotations

import asyncio

import msgspec

from sensorium.api.context import Context
from sensorium.api.generated import Work
from sensorium.api.output_format import check_tools
from sensorium.api.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request


async def tokenize(context: Context, call: Call) -> None:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, TokenizeRequest, context.limits, context.unknown, pending)
        request.check(context.server)
        async with context.acquire(request.model) as entry:
            with entry.admission.admit(1):
                async with context.open_request(call):
                    tokens = await _tokens(Work(context, call, entry), request)
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


async def _tokens(work: Work, request: TokenizeRequest) -> list[int]:
    model = work.model
    if request.prompt is not None:
        return await model.prompts.encode(
            request.prompt, add_special_tokens=request.add_special_tokens is not False, tenant=work.turn
        )
    conversation = request.conversation(model.processor.modalities, work.limits)
    check_tools(work, request, conversation)
    prompt = await model.prompts.chat_prompt(
        conversation.messages,
        conversation.media,
        add_special_tokens=bool(request.add_special_tokens),
        tenant=work.turn,
        salt=work.salt(),
        tools=request.tool_objects,
        **request.template_options(),
    )
    tokens: list[int] = prompt.token_ids.tolist()
    return tokens


async def detokenize(context: Context, call: Call) -> None:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, DetokenizeRequest, context.limits, context.unknown, pending)
        async with context.acquire(request.model) as entry, context.open_request(call):
            entry.model.tokenizer.check_ids(request.tokens, param="tokens")
            text = await asyncio.to_thread(entry.model.tokenizer.decode, request.tokens, skip_special_tokens=False)
            await call.respond(msgspec.json.encode({"prompt": text}))
