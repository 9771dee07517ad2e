"""Vectors as JSON: lists of numbers, or base64 of little-endian float32. Large answers are written in a thread."""

from __future__ import annotations

import asyncio
import secrets
import time
from base64 import b64encode
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensorium.api.pooled import usage_object
from sensorium.api.protocol.pooling import Encoding
from sensorium.api.transport.asgi import Call
from sensorium.serving.pooled import Pooled

LARGE = 32 * 1024
"""Numbers from which writing them takes longer than a thread needs to take over."""

_encode = msgspec.json.Encoder().encode


def vector_json(vector: NDArray[np.float32], encoding: Encoding) -> bytes:
    """[dim] or [tokens, dim] as a JSON value; a matrix in base64 is its rows one after the other."""
    if encoding == "base64":
        return b'"' + b64encode(np.ascontiguousarray(vector, "<f4").tobytes()) + b'"'
    if vector.ndim == 1:
        return _encode(vector.tolist())
    return b"[" + b",".join(_encode(row.tolist()) for row in vector) + b"]"


async def respond_vectors(
    call: Call, pooled: Pooled, *, prefix: str, model: str, kind: str, key: str, encoding: Encoding
) -> None:
    """OpenAI's list object, one entry per vector: {"index", "object": kind, key: vector}."""

    def data() -> bytes:
        rows = (
            b'{"index":%d,"object":%b,%b:%b}' % (index, _encode(kind), _encode(key), vector_json(vector, encoding))
            for index, vector in enumerate(pooled.vectors)
        )
        return b"[" + b",".join(rows) + b"]"

    await call.respond(envelope(prefix, model, await _written(data, pooled.vectors), usage_object(pooled)))


async def _written(data: Callable[[], bytes], vectors: Sequence[NDArray[np.float32]]) -> bytes:
    if sum(vector.size for vector in vectors) < LARGE:
        return data()
    return await asyncio.to_thread(data)


def envelope(prefix: str, model: str, data: bytes, usage: dict[str, object]) -> bytes:
    """What all lists have around their data."""
    head = _encode(
        {"id": f"{prefix}-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": model}
    )
    return head[:-1] + b',"data":' + data + b',"usage":' + _encode(usage) + b"}"
