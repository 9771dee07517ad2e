"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sensorium.api.context import Context
from sensorium.api.foreign import TranslatedChat
from sensorium.api.foreign import count_tokens as count_prompt
from sensorium.api.generated import Work, answer_generated
from sensorium.api.guards.admission import PendingBody
from sensorium.api.ids import new_id
from sensorium.api.message_content import Content, Event
from sensorium.api.protocol.messages import CountTokensRequest, MessagesRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.sse import EventStream, named_event
from sensorium.prompt.formats.base import Delta
from sensorium.serving.generation import Choice, Generation, Usage

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


async def messages(context: Context, call: Call) -> None:
    async def read(pending: PendingBody) -> MessageAnswer:
        request = await read_request(call, MessagesRequest, context.limits, context.unknown, pending)
        request.check(context.limits)
        return MessageAnswer(request)

    await answer_generated(context, call, read)


async def count_tokens(context: Context, call: Call) -> None:
    """Nothing is computed for it, nor decoded: clients ask before every message."""
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, CountTokensRequest, context.limits, context.unknown, pending)
        request.check(context.limits)
        async with context.acquire(request.model, "generate") as entry:
            entry.need("generate")
            async with context.open_request(call):
                tokens = await count_prompt(Work(context, call, entry), request.as_chat())
                await call.respond(msgspec.json.encode({"input_tokens": tokens}))


class MessageAnswer(TranslatedChat):
    def __init__(self, request: MessagesRequest) -> None:
        super().__init__(request.as_chat())
        self._model = request.model
        self._max_tokens = request.max_tokens

    async def answer(self, work: Work, generation: Generation) -> None:
        content = Content(work.context.signing_key)
        identity = new_id("msg")
        if self.request.stream:
            await self._stream(work, generation, content, identity)
            return

        async def keep(choice: Choice, deltas: Sequence[Delta]) -> None:
            content.push(deltas)

        await generation.run(keep)
        stop_reason, stop_sequence = self._end(generation.choices[0], content)
        content.finish(cut=stop_reason not in ("end_turn", "tool_use"))
        usage = generation.usage()
        found = self._message(identity, usage, output_tokens=usage.completion_tokens)
        found |= {"content": content.blocks, "stop_reason": stop_reason, "stop_sequence": stop_sequence}
        found["stop_details"] = None
        await work.call.respond(msgspec.json.encode(found))

    async def _stream(self, work: Work, generation: Generation, content: Content, identity: str) -> None:
        keep_alive_s = work.context.limits.keep_alive_comment_s
        async with EventStream(work.call, keep_alive_s, done=b"", comment=PING) as stream:

            async def emit(choice: Choice, deltas: Sequence[Delta]) -> None:
                events = content.push(deltas)
                if not stream.started:
                    events.insert(0, self._start(identity, generation.usage()))
                if events:
                    await stream.write(_written(events))

            await generation.run(emit)
            stop_reason, stop_sequence = self._end(generation.choices[0], content)
            events = content.finish(cut=stop_reason not in ("end_turn", "tool_use"))
            delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
            usage = {"output_tokens": generation.completion_tokens}
            events += [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]
            await stream.end(_written(events))

    def _start(self, identity: str, usage: Usage) -> Event:
        return {"type": "message_start", "message": self._message(identity, usage, output_tokens=0)}

    def _message(self, identity: str, usage: Usage, *, output_tokens: int) -> dict[str, Any]:
        """Without its content and its end. Tokens of the prompt count where they were found: in the cache or not."""
        return {
            "id": identity,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": usage.prompt_tokens - usage.cached_tokens,
                "output_tokens": output_tokens,
                "cache_read_input_tokens": usage.cached_tokens,
                "cache_creation_input_tokens": 0,
            },
        }

    def _end(self, choice: Choice, content: Content) -> tuple[str, str | None]:
        """Why it ended, and the stop sequence if that was it."""
        if isinstance(choice.stop_reason, str):
            return "stop_sequence", choice.stop_reason
        if choice.finish_reason == "length":
            fits = choice.num_tokens >= self._max_tokens
            return "max_tokens" if fits else "model_context_window_exceeded", None
        return "tool_use" if content.has_calls else "end_turn", None


def _written(events: Sequence[Event]) -> bytes:
    return b"".join(map(named_event, events))
