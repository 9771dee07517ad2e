"""POST /invocations, as SageMaker calls models: any of the other endpoints' bodies, whose fields say which is meant."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec

from sensorium.api.chat import chat_completions
from sensorium.api.completions import completions
from sensorium.api.context import Context
from sensorium.api.embeddings import embeddings
from sensorium.api.pooling import classify, pooling
from sensorium.api.score import rerank, score
from sensorium.api.tei import embed, predict
from sensorium.api.tokens import detokenize
from sensorium.api.transcriptions import transcriptions
from sensorium.api.transport.asgi import Call, Message
from sensorium.api.transport.body import check_json_type, read_json
from sensorium.errors import RequestError

Endpoint = Callable[[Context, Call], Awaitable[None]]
Fields = Mapping[str, msgspec.Raw]

_BY_FIELD: Mapping[str, Endpoint] = {
    "prompt": completions,
    "queries": score,
    "text_1": score,
    "data_1": score,
    "documents": rerank,
    "texts": rerank,
    "tokens": detokenize,
}
_POOLED: Mapping[str, Endpoint] = {"embed": embeddings, "classify": classify}


async def invocations(context: Context, call: Call) -> None:
    """The body is read once here to be looked at, and given to the endpoint that it is for."""
    if (call.header(b"content-type") or b"").lower().startswith(b"multipart/form-data"):
        await transcriptions(context, call)
        return
    check_json_type(call)
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        body, bounds = await read_json(call, context.limits, pending)
        fields = _fields(body) if bounds.is_small else await pending.in_turn(lambda: _fields(body))
        endpoint = _endpoint(context, fields)
    call.receive = _Replay(call, bytes(body)).receive
    await endpoint(context, call)


def _fields(body: bytearray) -> Fields | None:
    """What stands at the body's top; None if it is no object, which its endpoint has words for."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return None


def _endpoint(context: Context, fields: Fields | None) -> Endpoint:
    if fields is None:
        return chat_completions
    given = {name for name, value in fields.items() if bytes(value) != b"null"}
    if given & {"messages", "input"}:
        return _for_chats_or_inputs(context, fields, given)
    if "inputs" in given:
        return embed if "embed" in context.catalog.find(None, "embed").tasks else predict
    for name, endpoint in _BY_FIELD.items():
        if name in given:
            return endpoint
    raise RequestError(
        "The body must have the fields of one of the API's requests: `messages`, `prompt`, `input`, "
        "`inputs`, `query` and `documents`, `text_1` and `text_2`, or `tokens`.",
        param="messages",
        code="missing_required_parameter",
    )


def _for_chats_or_inputs(context: Context, fields: Fields, given: set[str]) -> Endpoint:
    """Chats are continued by a model that generates, and pooled like other inputs by one that does not."""
    try:
        model = msgspec.json.decode(fields["model"], type=str) if "model" in given else None
    except msgspec.DecodeError:
        model = None
    tasks = context.catalog.find(model).tasks
    if "messages" in given and "generate" in tasks:
        return chat_completions
    if "task" in given:
        return pooling
    return next((endpoint for task, endpoint in _POOLED.items() if task in tasks), pooling)


class _Replay:
    """Gives a body that has been read once more, then what else comes."""

    def __init__(self, call: Call, body: bytes) -> None:
        self._receive = call.receive
        self._body: bytes | None = body

    async def receive(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}
