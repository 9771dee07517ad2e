"""Vectors as clients want them: JSON lists, base64, bits, or raw bytes. Large answers are written in a thread."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensorium.api.numbers import item_bytes, packed
from sensorium.api.pooled import usage_object
from sensorium.api.protocol.pooling import EncodedBody
from sensorium.api.transport.asgi import Call
from sensorium.errors import RequestError
from sensorium.serving.pooled import Pooled

LARGE = 32 * 1024
"""Numbers from which writing them takes longer than a thread needs to take over."""
MAX_METADATA_BYTES = 60_000
"""Of the header that describes an answer of raw bytes: clients refuse longer ones."""

Form = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
"""How one vector stands in JSON."""
_encode = msgspec.json.Encoder().encode


def vector_json(vector: NDArray[np.float32], form: Form, dtype: str = "float32", endianness: str = "native") -> bytes:
    """[dim] or [tokens, dim] as a JSON value. A matrix in base64 is its rows one after the other; `dtype` and
    `endianness` are of base64 only.

    int8 is by the largest number of each vector, uint8 the same from 0 to 255; binary has a bit for each number, 1
    where it is positive, eight of them in a byte (ubinary), as a signed number (binary).
    """
    if form == "base64":
        return b'"' + b64encode(packed(vector, dtype, endianness)) + b'"'
    numbers: NDArray[Any] = vector if form == "float" else _quantized(vector, form)
    if numbers.ndim == 1:
        return _encode(numbers.tolist())
    return b"[" + b",".join(_encode(row.tolist()) for row in numbers) + b"]"


def _quantized(vector: NDArray[np.float32], form: Form) -> NDArray[np.generic]:
    if form in ("binary", "ubinary"):
        bits = np.packbits(vector > 0, axis=-1)
        return bits if form == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    largest = np.abs(vector).max(axis=-1, keepdims=True)
    codes = np.rint(vector / np.where(largest > 0, largest, 1) * 127).astype(np.int16)
    return codes if form == "int8" else codes + 128


@dataclass(frozen=True, slots=True)
class Kind:
    """What an endpoint's list is of: {"index", "object": name, key: vector}; ids begin with `prefix`."""

    prefix: str
    name: str
    key: str


async def respond_vectors(
    call: Call, pooled: Pooled, kind: Kind, model: str, body: EncodedBody, form: Form | None = None
) -> None:
    """OpenAI's list object, one entry per vector, or their bytes as vLLM sends them. `form` goes before the body's
    encoding."""
    encoding, dtype, endianness = body.encoding_format or "float", body.embed_dtype, body.endianness
    if encoding in ("bytes", "bytes_only"):
        await _respond_bytes(call, pooled, kind, model, body)
        return
    written: Form = form or ("base64" if encoding == "base64" else "float")

    def data() -> bytes:
        rows = (
            b'{"index":%d,"object":%b,%b:%b}'
            % (
                index,
                _encode(kind.name),
                _encode(kind.key),
                vector_json(vector, written, dtype or "float32", endianness or "native"),
            )
            for index, vector in enumerate(pooled.vectors)
        )
        return b"[" + b",".join(rows) + b"]"

    listed = await written_in_time(data, pooled.vectors)
    await call.respond(envelope(call, kind.prefix, model, listed, usage_object(pooled)))


async def _respond_bytes(call: Call, pooled: Pooled, kind: Kind, model: str, body: EncodedBody) -> None:
    """All vectors one after the other; with `bytes`, the header `metadata` says where each is."""
    dtype, endianness = body.embed_dtype or "float32", body.endianness or "native"
    rows, end = [], 0
    for index, vector in enumerate(pooled.vectors):
        start, end = end, end + vector.size * item_bytes(dtype)
        row = {"index": index, "embed_dtype": dtype, "endianness": endianness, "start": start, "end": end}
        rows.append({**row, "shape": vector.shape})
    headers = []
    if body.encoding_format == "bytes":
        head = {"id": call.answer_id(f"{kind.prefix}-"), "created": int(time.time()), "model": model}
        metadata = json.dumps({**head, "data": rows, "usage": usage_object(pooled)}).encode("ascii")
        if len(metadata) > MAX_METADATA_BYTES:
            raise RequestError(
                f"The header that describes {len(rows)} vectors would be longer than clients take: use the "
                "`encoding_format` bytes_only, or send fewer inputs.",
                param="encoding_format",
            )
        headers.append((b"metadata", metadata))

    def data() -> bytes:
        return b"".join(packed(vector, dtype, endianness) for vector in pooled.vectors)

    answer = await written_in_time(data, pooled.vectors)
    await call.respond(answer, content_type=b"application/octet-stream", headers=headers)


async def written_in_time(data: Callable[[], bytes], vectors: Sequence[NDArray[np.float32]]) -> bytes:
    """What `data` writes of the vectors, off the event loop if that takes long."""
    if sum(vector.size for vector in vectors) < LARGE:
        return data()
    return await asyncio.to_thread(data)


def envelope(call: Call, prefix: str, model: str, data: bytes, usage: dict[str, object]) -> bytes:
    """What all lists have around their data."""
    head = _encode({"id": call.answer_id(f"{prefix}-"), "object": "list", "created": int(time.time()), "model": model})
    return head[:-1] + b',"data":' + data + b',"usage":' + _encode(usage) + b"}"
