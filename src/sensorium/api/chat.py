"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from sensorium.api.answer import Answer, Answers, ask
from sensorium.api.context import Entry, Service
from sensorium.api.logprobs import chat_logprobs
from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.frames import StreamHead, chat_frames
from sensorium.api.transport.sse import EventStream
from sensorium.types import Prompt

_NO_DELTA = b'"delta":{}'


async def chat_completions(service: Service, call: Call) -> None:
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        request = await read_request(call, ChatRequest, service.limits, service.unknown, pending)
        request.check(service.limits, service.server)
        entry = service.entry(request.model)
        entry.need("generate")
        with entry.admission.admit(request.choices) as permit:
            async with service.flight(call):
                salt = service.salts.of(call.tenant, request.cache_salt)
                prompt, echoed = await _prompt(service, call, entry, request, salt)
                request = request.without_messages()  # media in base64 are not kept while tokens come
                pending.release()
                permit.add_prompt_tokens(len(prompt.token_ids))
                params = request.sampling(entry.model.defaults, len(prompt.token_ids))
                answers = ask(
                    entry,
                    request,
                    [(prompt, params)],
                    salt,
                    started_s=call.started_s,
                    continues=bool(request.continue_final_message),
                )
                with answers:
                    await _answer(service, call, entry, request, echoed, answers)
                    call.note = f"{answers.prompt_tokens} + {answers.completion_tokens} tokens"


async def _prompt(service: Service, call: Call, entry: Entry, request: ChatRequest, salt: bytes) -> tuple[Prompt, str]:
    """The prompt, and what the answer repeats: with `echo`, the assistant's last message that it continues."""
    conversation = request.conversation(entry.model.processor.modalities, service.limits)
    prepared = await entry.model.prompts.prepare_chat(
        conversation.messages,
        conversation.media,
        add_special_tokens=bool(request.add_special_tokens),
        tenant=call.turn,
        salt=salt,
        **request.template_options(),
    )
    entry.metrics.observe_prompt(prepared.text_s, prepared.media)
    continues = request.echo and conversation.messages[-1].role == "assistant"
    return prepared.prompt, conversation.last_text if continues else ""


async def _answer(
    service: Service, call: Call, entry: Entry, request: ChatRequest, echoed: str, answers: Answers
) -> None:
    head = StreamHead("chatcmpl-" + secrets.token_hex(12), int(time.time()), request.model or entry.name)
    if request.stream:
        await _stream(service, call, entry, request, answers, head, echoed)
        return
    texts = await answers.collect()
    choices = [
        _choice(entry, request, answer, echoed + text) for answer, text in zip(answers.answers, texts, strict=True)
    ]
    await call.respond(
        msgspec.json.encode(
            {
                "id": head.id,
                "object": "chat.completion",
                "created": head.created,
                "model": head.model,
                "choices": choices,
                "usage": answers.usage(),
                "system_fingerprint": None,
                "service_tier": None,
            }
        )
    )


def _choice(entry: Entry, request: ChatRequest, answer: Answer, text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "index": answer.index,
        "message": message,
        "logprobs": _logprobs(entry, request, answer),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


def _logprobs(entry: Entry, request: ChatRequest, answer: Answer) -> dict[str, Any] | None:
    if not request.logprobs:
        return None
    return chat_logprobs(entry.model.tokenizer, answer.take_logprobs())


async def _stream(
    service: Service, call: Call, entry: Entry, request: ChatRequest, answers: Answers, head: StreamHead, echoed: str
) -> None:
    frames = chat_frames(
        head, include_usage=request.includes_usage, running_usage=answers.usage_without if request.runs_usage else None
    )
    begun: set[int] = set()
    async with EventStream(call, service.limits.keep_alive_comment_s) as events:

        async def emit(answer: Answer, text: str) -> None:
            index = answer.index
            event = b""
            if index not in begun:
                begun.add(index)
                unsent = answer.num_tokens
                event = frames.role(index, unsent) + (frames.text(index, echoed, unsent=unsent) if echoed else b"")
            if answer.finish_reason is not None:
                event += frames.finish(
                    index,
                    text,
                    _logprobs(entry, request, answer),
                    answer.finish_reason,
                    answer.stop_reason,
                    empty=_NO_DELTA,
                )
            elif text:
                event += frames.text(index, text, _logprobs(entry, request, answer))
            if event:
                await events.write(event)

        await answers.run(emit)
        await events.end(frames.usage(answers.usage()) if request.includes_usage else b"")
