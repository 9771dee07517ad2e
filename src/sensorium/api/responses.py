"""POST /v1/responses and /v1/responses/input_tokens: stateless, every answer built from its own events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from sensorium.api.chat import Chat
from sensorium.api.context import Context
from sensorium.api.generated import Asker, Work, answer_counted, answer_generated
from sensorium.api.guards.admission import PendingBody
from sensorium.api.logprobs import chat_logprobs, token_names
from sensorium.api.protocol.responses import ResponsesRequest
from sensorium.api.response_items import ResponseItems
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.errors import OpenAIErrors, error_object
from sensorium.api.transport.sse import EventStream, named_event
from sensorium.errors import ContextLengthError, NotFoundError, RequestError, SensoriumError
from sensorium.prompt.formats.base import Delta, Text
from sensorium.serving.generation import Choice, Generation, GenerationRequest, Usage
from sensorium.serving.prompts import Prepared

Event = dict[str, Any]


async def responses(context: Context, call: Call) -> None:
    async def read(pending: PendingBody) -> Response:
        return await _read(context, call, pending)

    await answer_generated(context, call, read)


async def input_tokens(context: Context, call: Call) -> None:
    async def read(pending: PendingBody) -> Response:
        return await _read(context, call, pending)

    def answer(count: int) -> dict[str, Any]:
        return {"object": "response.input_tokens", "input_tokens": count}

    await answer_counted(context, call, read, answer)


async def not_kept(context: Context, call: Call) -> None:
    raise NotFoundError("Answers are not kept on this server: send what was said before with the next request.")


async def _read(context: Context, call: Call, pending: PendingBody) -> Response:
    body = await read_request(call, ResponsesRequest, context.limits, context.unknown, pending)
    body.check_limits(context.limits)
    return Response(body, context, call)


class Response(Chat):
    """One request of this endpoint."""

    def __init__(self, body: ResponsesRequest, context: Context, call: Call) -> None:
        super().__init__(body.chat(context.limits, context.server, context.unknown))
        self._body = body.model_copy(update={"input": ""})  # media in base64 are not kept
        self._id = call.answer_id("resp_")
        self._created = int(time.time())

    async def prepare(self, work: Asker) -> GenerationRequest:
        try:
            return await super().prepare(work)
        except RequestError as error:
            raise _here(error) from None

    async def prompt(self, work: Asker) -> Prepared:
        """With `truncation` auto, without as many of the oldest turns as do not fit."""
        dropped = 1
        while True:
            try:
                return await super().prompt(work)
            except ContextLengthError as error:
                if self._body.truncation != "auto" or not self._drop(dropped):
                    raise _here(error) from None
                dropped *= 2

    async def count(self, work: Asker) -> int:
        """Of what would be computed: with `truncation` auto, of what is left of it."""
        if self._body.truncation == "auto":
            return len((await self.prompt(work)).prompt.token_ids)
        try:
            return await super().count(work)
        except RequestError as error:
            raise _here(error) from None

    def _drop(self, turns: int) -> bool:
        """Take the oldest turns out, but what the system says and the last thing that the user does. False: there are
        none."""
        messages = self.request.messages
        first = next((index for index, one in enumerate(messages) if one.role not in ("system", "developer")), 0)
        starts = [index for index, one in enumerate(messages) if one.role == "user" and index > first]
        if not starts:
            return False
        kept = messages[:first] + messages[starts[min(turns, len(starts)) - 1] :]
        self.request = self.request.model_copy(update={"messages": kept})
        return True

    async def answer(self, work: Work, generation: Generation) -> None:
        items = ResponseItems(self._body)
        if self._body.stream:
            await self._stream(work, generation, items)
            return

        async def take(choice: Choice, deltas: Sequence[Delta]) -> None:
            items.add(deltas, self._logprobs(work, choice, deltas))

        await generation.run(take)
        items.finish(is_whole=generation.choices[0].finish_reason != "length")
        await work.call.respond(msgspec.json.encode(self._object(work, generation, items)))

    async def _stream(self, work: Work, generation: Generation, items: ResponseItems) -> None:
        stream = _Events()
        limits = work.context.limits
        async with EventStream(work.call, limits.keep_alive_comment_s, done=b"") as events:
            begun = self._object(work, generation, items)
            work.call.errors = _FailedResponse(stream, begun)

            async def emit(choice: Choice, deltas: Sequence[Delta]) -> None:
                written = stream.begin(begun) if stream.count == 0 else b""
                made = items.add(deltas, self._logprobs(work, choice, deltas))
                if written or made:
                    await events.write(written + stream.encode(made))

            await generation.run(emit)
            is_whole = generation.choices[0].finish_reason != "length"
            made = items.finish(is_whole=is_whole)
            kind = "response.completed" if is_whole else "response.incomplete"
            made.append({"type": kind, "response": self._object(work, generation, items)})
            await events.end(stream.encode(made))

    def _logprobs(self, work: Work, choice: Choice, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """Of the tokens of new text. Those of calls and reasoning have no place here."""
        if not self.request.logprobs or not deltas:
            return []
        taken = choice.take_logprobs()
        if not any(isinstance(delta, Text) for delta in deltas):
            return []
        content: list[dict[str, Any]] = chat_logprobs(token_names(work.entry.model.tokenizer), taken)["content"]
        return content

    def _object(self, work: Work, generation: Generation, items: ResponseItems) -> dict[str, Any]:
        """The response as far as it has come."""
        body, params = self._body, generation.request.prompts[0][1]
        now = int(time.time())
        settings, text = body.reasoning, body.text
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": now if items.status == "completed" else None,
            "status": items.status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if items.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": body.model or work.entry.name,
            "output": list(items.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": settings.effort if settings else None,
                "summary": settings.summary if settings else None,
            },
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": _plain(text.format) if text and text.format else {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
            "tools": [_plain(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None if items.status == "in_progress" else _usage(generation.usage()),
            "user": body.user,
        }


class _Events:
    """Numbers events and writes them."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, response: dict[str, Any]) -> bytes:
        return self.encode([{"type": f"response.{kind}", "response": response} for kind in ("created", "in_progress")])

    def encode(self, events: Sequence[Event]) -> bytes:
        written = []
        for event in events:
            written.append(named_event({**event, "sequence_number": self.count}))
            self.count += 1
        return b"".join(written)


class _FailedResponse(OpenAIErrors):
    """What ends a stream that broke: the response, failed. Before the stream, an error has its ordinary form."""

    def __init__(self, events: _Events, response: dict[str, Any]) -> None:
        self._events = events
        self._response = response

    def event(self, error: SensoriumError, call: Call) -> bytes:
        found = error_object(error)
        code = found["code"] if isinstance(error, RequestError) else "server_error"
        told = {"code": code, "message": error.message}
        failed = {**self._response, "status": "failed", "error": told}
        return self._events.encode([{"type": "response.failed", "response": failed}])


def _here(error: RequestError) -> RequestError:
    """An error about the chat, in this endpoint's words."""
    if error.param == "messages":
        error.param = "input"
    return error


def _usage(usage: Usage) -> dict[str, Any]:
    """With numbers everywhere: clients read all of them."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(exclude_none=True, by_alias=True)
