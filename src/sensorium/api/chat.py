"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from sensorium.api.context import Context, Entry
from sensorium.api.generated import (
    Asker,
    Work,
    answer_counted,
    answer_generated,
    new_ids,
    prompt_ids,
    running_usage,
    usage_object,
)
from sensorium.api.guards.admission import PendingBody
from sensorium.api.ids import new_id
from sensorium.api.logprobs import chat_logprobs, prompt_logprobs, token_names
from sensorium.api.output_format import check_tools, with_format
from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.content import Conversation
from sensorium.api.transport import asgi
from sensorium.api.transport.body import read_request
from sensorium.api.transport.frames import Frames, StreamHead, chat_frames
from sensorium.api.transport.sse import EventStream
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text
from sensorium.serving.generation import Choice, Generation, GenerationRequest, Message
from sensorium.serving.prompts import Prepared

_NO_DELTA = b'"delta":{}'


async def chat_completions(context: Context, call: asgi.Call) -> None:
    async def read(pending: PendingBody) -> ChatCompletion:
        return await _read(context, call, pending)

    await answer_generated(context, call, read)


async def chat_input_tokens(context: Context, call: asgi.Call) -> None:
    async def read(pending: PendingBody) -> ChatCompletion:
        return await _read(context, call, pending)

    await answer_counted(context, call, read, lambda count: {"object": "chat.input_tokens", "input_tokens": count})


async def _read(context: Context, call: asgi.Call, pending: PendingBody) -> ChatCompletion:
    request = await read_request(call, ChatRequest, context.limits, context.unknown, pending)
    request.check(context.limits, context.server)
    return ChatCompletion(request)


class Chat:
    """A request whose prompt is a conversation. What answers it is its subclass's own."""

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.echoed = ""

    @property
    def model_name(self) -> str | None:
        return self.request.model

    @property
    def num_sequences(self) -> int:
        return self.request.choices

    def conversation(self, work: Asker) -> Conversation:
        return self.request.conversation(work.model.processor.modalities, work.limits)

    async def prompt(self, work: Asker) -> Prepared:
        """The conversation as the model will read it."""
        request, model = self.request, work.model
        conversation = self.conversation(work)
        check_tools(work, request, conversation)
        if request.echo and conversation.messages[-1].role == "assistant":  # the message that is continued
            self.echoed = conversation.last_text
        return await model.prompts.prepare_chat(
            conversation.messages,
            conversation.media,
            add_special_tokens=bool(request.add_special_tokens),
            truncation=model.truncation(
                request.truncate_prompt_tokens, request.truncation_side, completion=request.length or 1
            ),
            tenant=work.turn,
            salt=work.salt(request.cache_salt),
            tools=request.tool_objects,
            **request.template_options(),
        )

    async def count(self, work: Asker) -> int:
        """Tokens of the prompt, however many; media are measured, not decoded."""
        request, model = self.request, work.model
        if request.truncate_prompt_tokens is not None:
            return len((await self.prompt(work)).prompt.token_ids)
        conversation = self.conversation(work)
        check_tools(work, request, conversation)
        return await model.prompts.count_chat(
            conversation.messages,
            conversation.media,
            add_special_tokens=bool(request.add_special_tokens),
            tenant=work.turn,
            salt=work.salt(request.cache_salt),
            tools=request.tool_objects,
            **request.template_options(),
        )

    async def prepare(self, work: Asker) -> GenerationRequest:
        """What is sent to the engine. Media in base64 are not kept while tokens come."""
        model = work.model
        grammar = await model.grammars.held(self.request.form(), work.turn)
        prepared = await self.prompt(work)
        work.observer.observe_prompt(prepared.text_s, prepared.media)
        request = self.request = self.request.without_messages()
        params = replace(request.sampling(model.defaults, len(prepared.prompt.token_ids)), grammar=grammar)
        asked = request.generation(
            ((prepared.prompt, params),), work.salt(request.cache_salt), continues=request.continues
        )
        return await with_format(model, request, asked, prepared.tail, work.turn)


class ChatCompletion(Chat):
    """Answered as OpenAI's chat completions are."""

    async def answer(self, work: Work, generation: Generation) -> None:
        request, entry = self.request, work.entry
        head = StreamHead(work.call.answer_id("chatcmpl-"), int(time.time()), request.model or entry.name)
        if request.stream:
            await self._stream(work, generation, head)
            return
        messages = await generation.collect()
        body = {
            "id": head.id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [
                self._choice(entry, choice, message)
                for choice, message in zip(generation.choices, messages, strict=True)
            ],
            "usage": usage_object(generation.usage()),
            "prompt_logprobs": self._prompt_logprobs(entry, generation.choices[0]),
            **prompt_ids(generation.choices[0], request),
            "system_fingerprint": None,
            "service_tier": None,
        }
        await work.call.respond(msgspec.json.encode(body))

    def _choice(self, entry: Entry, choice: Choice, message: Message) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": message_object(message, self.echoed),
            "logprobs": self.logprobs(entry, choice),
            "finish_reason": choice.reason(calls=bool(message.calls)),
            "stop_reason": choice.stop_reason,
            **new_ids(choice, self.request),
        }

    def _prompt_logprobs(self, entry: Entry, choice: Choice) -> list[Any] | None:
        if self.request.prompt_logprobs is None:
            return None
        return prompt_logprobs(entry.model.tokenizer, choice, self.request.prompt_logprobs)

    def logprobs(self, entry: Entry, choice: Choice) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        names = token_names(entry.model.tokenizer, as_ids=self.request.return_tokens_as_token_ids)
        return chat_logprobs(names, choice.take_logprobs())

    async def _stream(self, work: Work, generation: Generation, head: StreamHead) -> None:
        request = self.request
        frames = chat_frames(
            head,
            include_usage=request.includes_usage,
            running_usage=running_usage(generation) if request.runs_usage else None,
        )
        is_plain = generation.request.scanner is None and not request.logprobs and not request.return_token_ids
        writers = [_ChoiceStream(self, work.entry, choice, frames, is_plain=is_plain) for choice in generation.choices]
        async with EventStream(work.call, work.context.limits.keep_alive_comment_s) as events:

            async def emit(choice: Choice, deltas: Sequence[Delta]) -> None:
                if event := writers[choice.index].events(deltas):
                    await events.write(event)

            await generation.run(emit)
            usage = frames.usage(usage_object(generation.usage())) if request.includes_usage else b""
            await events.end(usage)


class _ChoiceStream:
    """One choice's events. `is_plain`: between the first and the last there is nothing but text."""

    def __init__(self, chat: ChatCompletion, entry: Entry, choice: Choice, frames: Frames, *, is_plain: bool) -> None:
        self._chat = chat
        self._entry = entry
        self._choice = choice
        self._frames = frames
        self._is_plain = is_plain
        self._begun = False
        self._calls = False

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """For what one engine output added; b"" if there is nothing to say."""
        choice, frames = self._choice, self._frames
        if self._is_plain and self._begun and choice.finish_reason is None:  # nearly every event
            return b"".join([frames.text(choice.index, delta.text) for delta in deltas if isinstance(delta, Text)])
        events = [] if self._begun else self._begin()
        ends = choice.finish_reason is not None
        last = deltas[-1].text if ends and deltas and isinstance(deltas[-1], Text) else ""
        logprobs = self._chat.logprobs(self._entry, choice) if deltas or ends else None
        more = new_ids(choice, self._chat.request) if deltas or ends else {}
        for delta in deltas[:-1] if last else deltas:
            self._calls |= isinstance(delta, Call)
            if isinstance(delta, Text):
                events.append(frames.text(choice.index, delta.text, logprobs, more=more))
            else:
                events.append(frames.delta(choice.index, delta_object(delta), logprobs, more=more))
            logprobs, more = None, {}
        if ends:
            reason = choice.reason(calls=self._calls) or "stop"
            stop = choice.stop_reason
            events.append(frames.finish(choice.index, last, logprobs, reason, stop, empty=_NO_DELTA, more=more))
        return b"".join(events)

    def _begin(self) -> list[bytes]:
        self._begun = True
        index, unsent, echoed = self._choice.index, self._choice.num_tokens, self._chat.echoed
        events = [self._frames.role(index, unsent, beside=prompt_ids(self._choice, self._chat.request))]
        if echoed:
            events.append(self._frames.text(index, echoed, unsent=unsent))
        return events


def message_object(message: Message, echoed: str = "") -> dict[str, Any]:
    """OpenAI's `message`. Reasoning stands under both names that clients read; `echoed` is before the text."""
    text = echoed + message.text
    found: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if message.reasoning:
        found |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
    if message.calls:
        found["tool_calls"] = [
            {"id": new_id("call"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    if (message.calls or message.reasoning) and not text.strip():
        found["content"] = None
    return found


def delta_object(delta: Reasoning | Call | Arguments) -> dict[str, Any]:
    """OpenAI's `delta` of what is not text. A call's name comes once and whole, its arguments in pieces."""
    match delta:
        case Reasoning(text):
            return {"reasoning": text, "reasoning_content": text}
        case Call(index, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": new_id("call"), "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
