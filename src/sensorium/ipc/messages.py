"""What the two processes say to each other: length-prefixed frames on a stream socket, msgpack and raw arrays.

A frame is `<u32 payload bytes, u8 kind>` and its payload. Arrays follow their message's msgpack header as they lie in
memory, each at a multiple of 64 bytes, so that nobody copies them; nothing is pickled. The usual output, one plain
token for many requests, is two packed columns of numbers. Torch-free.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensorium.config import EngineConfig
from sensorium.types import (
    EngineOutput,
    EngineReady,
    EngineRequest,
    EngineStats,
    FinishReason,
    MediaFeatures,
    MediaSpan,
    Modality,
    PoolingParams,
    Prompt,
    SamplingParams,
    TokenLogprob,
    Vocabulary,
)

MAX_FRAME_BYTES = 2 * 1024**3
ALIGNMENT = 64
DTYPES = frozenset({"uint8", "int32", "int64", "float16", "float32"})  # that an array may have on the wire

_HEAD = struct.Struct("<IB")
_COUNT = struct.Struct("<I")
_ID = struct.Struct("<Q")
_BEGIN = struct.Struct("<QI")

T = TypeVar("T")
Buffer: TypeAlias = bytes | bytearray | memoryview


class Kind(IntEnum):
    CONFIG = 1  # to the engine, once
    REQUEST = 2
    ABORT = 3
    SHUTDOWN = 4
    VOCABULARY = 5  # once, before the first request with a grammar
    BEGIN = 6  # of a large request, whose payload comes in parts
    PART = 7
    DROP = 8  # what has arrived of it: the rest does not come
    LOAD_ADAPTER = 9  # before the first request with it
    UNLOAD_ADAPTER = 10
    PROGRESS = 16  # from the engine
    READY = 17
    OUTPUTS = 18
    STATS = 19
    FATAL = 20
    BEAT = 21  # the process runs
    ADAPTER = 22  # one was loaded, or could not be
    LOST = 23  # a rank, and with it the engine; from the engine or from a follower to rank 0
    RANK = 24  # to a follower, once: which rank it is
    LOADED = 25  # from a follower: what it has and could have
    CACHE = 26  # to a follower, once: the cache that all ranks have
    STEP = 27
    LOGITS = 28  # of the last step
    ENCODE = 29  # to a follower: media for its towers
    ADVANCE = 30  # the next piece of them
    FORGET = 31  # them: nobody waits for them any more
    ENCODED = 32  # from a follower: a piece, and with the last one all rows
    WAKE = 33  # inside the engine process, never on the wire: something is done that a thread was asked for


class ProtocolError(Exception):
    """The other process sent what it must not; the connection cannot go on."""


class ArraySpec(msgspec.Struct, array_like=True, frozen=True):
    """An array that follows its message's header."""

    dtype: str
    shape: tuple[int, ...]


class Media(msgspec.Struct, array_like=True, frozen=True):
    kind: Modality
    key: bytes
    num_rows: int
    names: tuple[str, ...]  # of its arrays, which stand in this order


class _Request(msgspec.Struct, array_like=True, frozen=True):
    """`arrays` describes: token ids, positions, token types (the last two may be absent), then every media item's."""

    id: int
    sampling: SamplingParams | None
    pooling: PoolingParams | None
    priority: int
    salt: bytes
    turn: bytes
    position_delta: int | float
    has_positions: bool
    has_token_types: bool
    spans: tuple[tuple[int, int, int, int], ...]
    media: tuple[Media, ...]
    arrays: tuple[ArraySpec, ...]
    adapter: int = 0


_Logprob: TypeAlias = tuple[int, float, tuple[tuple[int, float], ...]]


class _Output(msgspec.Struct, array_like=True, frozen=True):
    id: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_token_id: int | None
    logprobs: tuple[_Logprob, ...]
    prompt_logprobs: tuple[_Logprob | None, ...]
    cached_tokens: int
    vectors: tuple[tuple[int, ...], ...]  # their shapes
    error: str
    times: tuple[float, float, int]  # queue_s, prefill_s, preemptions


_encode = msgspec.msgpack.Encoder().encode
_config = msgspec.msgpack.Decoder(EngineConfig)
_request = msgspec.msgpack.Decoder(_Request)
_ids = msgspec.msgpack.Decoder(tuple[int, ...])
_vocabulary = msgspec.msgpack.Decoder(Vocabulary)
_progress = msgspec.msgpack.Decoder(tuple[str, float])
_named = msgspec.msgpack.Decoder(tuple[int, str])
_answer = msgspec.msgpack.Decoder(tuple[int, str, int])
_number = msgspec.msgpack.Decoder(int)
_ready = msgspec.msgpack.Decoder(EngineReady)
_stats = msgspec.msgpack.Decoder(EngineStats)
_outputs = msgspec.msgpack.Decoder(list[_Output])
_text = msgspec.msgpack.Decoder(str)


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload), kind) + payload


def encode_config(config: EngineConfig) -> bytes:
    return frame(Kind.CONFIG, _encode(config))


def decode_config(payload: Buffer) -> EngineConfig:
    return decoded(_config.decode, payload)


def encode_abort(ids: Sequence[int]) -> bytes:
    return frame(Kind.ABORT, _encode(ids))


def decode_abort(payload: Buffer) -> tuple[int, ...]:
    return decoded(_ids.decode, payload)


def encode_begin(request_id: int, size: int) -> bytes:
    return frame(Kind.BEGIN, _BEGIN.pack(request_id, size))


def decode_begin(payload: Buffer) -> tuple[int, int]:
    """(request, bytes of its payload)"""
    request_id, size = _unpacked(_BEGIN, payload)
    check_frame_size(size)
    return request_id, size


def part_head(request_id: int, size: int) -> bytes:
    """What stands before a part of so many bytes."""
    return _HEAD.pack(_ID.size + size, Kind.PART) + _ID.pack(request_id)


def parse_part_head(head: Buffer) -> int:
    """The request that a part belongs to, of its frame's first PART_HEAD_BYTES."""
    return int(_unpacked(_ID, head)[0])


def encode_drop(request_id: int) -> bytes:
    return frame(Kind.DROP, _ID.pack(request_id))


def decode_drop(payload: Buffer) -> int:
    return int(_unpacked(_ID, payload)[0])


def _unpacked(form: struct.Struct, payload: Buffer) -> tuple[Any, ...]:
    if len(payload) != form.size:
        raise ProtocolError(f"{len(payload)} bytes instead of {form.size}")
    return form.unpack(payload)


def encode_vocabulary(vocabulary: Vocabulary) -> bytes:
    return frame(Kind.VOCABULARY, _encode(vocabulary))


def decode_vocabulary(payload: Buffer) -> Vocabulary:
    return decoded(_vocabulary.decode, payload)


def encode_load_adapter(number: int, folder: str) -> bytes:
    """`number` is what requests will call it by; never used again, so that nothing is mistaken for what replaces it."""
    return frame(Kind.LOAD_ADAPTER, _encode((number, folder)))


def decode_load_adapter(payload: Buffer) -> tuple[int, str]:
    return decoded(_named.decode, payload)


def encode_unload_adapter(number: int) -> bytes:
    return frame(Kind.UNLOAD_ADAPTER, _encode(number))


def decode_unload_adapter(payload: Buffer) -> int:
    return decoded(_number.decode, payload)


def encode_adapter(number: int, error: str, nbytes: int) -> bytes:
    """`error` says in one line why it could not be loaded; "": it is, and takes `nbytes` of memory."""
    return frame(Kind.ADAPTER, _encode((number, error, nbytes)))


def decode_adapter(payload: Buffer) -> tuple[int, str, int]:
    return decoded(_answer.decode, payload)


def encode_progress(phase: str, fraction: float) -> bytes:
    return frame(Kind.PROGRESS, _encode((phase, fraction)))


def decode_progress(payload: Buffer) -> tuple[str, float]:
    return decoded(_progress.decode, payload)


def encode_ready(ready: EngineReady) -> bytes:
    return frame(Kind.READY, _encode(ready))


def decode_ready(payload: Buffer) -> EngineReady:
    return decoded(_ready.decode, payload)


def encode_stats(stats: EngineStats) -> bytes:
    return frame(Kind.STATS, _encode(stats))


def decode_stats(payload: Buffer) -> EngineStats:
    return decoded(_stats.decode, payload)


def encode_fatal(reason: str) -> bytes:
    return frame(Kind.FATAL, _encode(reason))


def decode_fatal(payload: Buffer) -> str:
    return decoded(_text.decode, payload)


def encode_lost(reason: str) -> bytes:
    return frame(Kind.LOST, _encode(reason))


def decode_lost(payload: Buffer) -> str:
    return decoded(_text.decode, payload)


def decoded(decode: Callable[[Buffer], T], payload: Buffer) -> T:
    try:
        return decode(payload)
    except (msgspec.MsgspecError, ValueError) as error:  # a ValueError where text is not UTF-8
        raise ProtocolError(f"malformed message: {error}") from None


# Requests


def encode_request(request: EngineRequest) -> list[Buffer]:
    """The frame in pieces: one head, then the arrays where they lie (or a copy, if they are not contiguous)."""
    prompt = request.prompt
    of_tokens = (prompt.token_ids, prompt.positions, prompt.token_types)
    arrays = [array for array in of_tokens if array is not None]
    for item in prompt.media:
        arrays.extend(item.arrays.values())  # any of DTYPES
    header = _encode(
        _Request(
            request.id,
            request.sampling,
            request.pooling,
            request.priority,
            request.salt,
            request.turn,
            prompt.position_delta,
            prompt.positions is not None,
            prompt.token_types is not None,
            tuple((s.item, s.offset, s.length, s.row) for s in prompt.spans),
            tuple(map(media_header, prompt.media)),
            specs_of(arrays),
            request.adapter,
        )
    )
    return with_arrays(Kind.REQUEST, header, arrays)


def media_header(one: MediaFeatures) -> Media:
    """What a header says of a media item whose arrays are sent behind it."""
    return Media(one.kind, one.key, one.num_rows, tuple(one.arrays))


def features_of(media: Iterable[Media], arrays: Iterator[NDArray[Any]]) -> Iterator[MediaFeatures]:
    """The items again, with their arrays in their order."""
    for one in media:
        yield MediaFeatures(one.kind, one.key, one.num_rows, {name: next(arrays) for name in one.names})


def specs_of(arrays: Sequence[NDArray[Any]]) -> tuple[ArraySpec, ...]:
    """What a header says of the arrays behind it. ProtocolError for types that have no place on the wire."""
    if unknown := {array.dtype.name for array in arrays} - DTYPES:
        raise ProtocolError(f"arrays of {', '.join(sorted(unknown))} cannot be sent")
    return tuple(ArraySpec(array.dtype.name, array.shape) for array in arrays)


def with_arrays(kind: Kind, header: bytes, arrays: Sequence[NDArray[Any]]) -> list[Buffer]:
    """A frame in pieces: its head and header, then the arrays where they lie."""
    pieces: list[Buffer] = [_COUNT.pack(len(header)) + header]
    size = len(pieces[0])
    for array in arrays:
        padding = -size % ALIGNMENT
        pieces.append(bytes(padding))
        pieces.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        size += padding + array.nbytes
    if size > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {size} bytes is larger than a frame may be")
    pieces[0] = _HEAD.pack(size, kind) + pieces[0]
    if size <= 1 << 16:
        return [b"".join(pieces)]
    return pieces


def decode_request(payload: memoryview) -> EngineRequest:
    """The arrays are views of `payload`, which must not be written to again."""
    wire, start = with_header(_request.decode, payload)
    arrays = iter(arrays_of(payload, start, wire.arrays))
    expected = 1 + wire.has_positions + wire.has_token_types + sum(len(m.names) for m in wire.media)
    if len(wire.arrays) != expected:
        raise ProtocolError(f"a request with {len(wire.arrays)} arrays instead of {expected}")
    token_ids = next(arrays)
    positions = next(arrays) if wire.has_positions else None
    token_types = next(arrays) if wire.has_token_types else None
    media = tuple(features_of(wire.media, arrays))
    spans = tuple(MediaSpan(*span) for span in wire.spans)
    prompt = Prompt(token_ids, media, spans, positions, wire.position_delta, token_types)
    return EngineRequest(
        wire.id, prompt, wire.sampling, wire.pooling, wire.priority, wire.salt, wire.turn, wire.adapter
    )


def with_header(decode: Callable[[Buffer], T], payload: memoryview) -> tuple[T, int]:
    """(the header, where its arrays begin)"""
    if len(payload) < _COUNT.size:
        raise ProtocolError("a message without header")
    end = _COUNT.size + _COUNT.unpack_from(payload)[0]
    return decoded(decode, payload[_COUNT.size : end]), end


def arrays_of(payload: memoryview, start: int, specs: Iterable[ArraySpec]) -> Iterable[NDArray[Any]]:
    """Views of the payload, whose header ends at `start`."""
    for spec in specs:
        if spec.dtype not in DTYPES or any(side < 0 for side in spec.shape):
            raise ProtocolError(f"an array of {spec.dtype} {spec.shape}")
        dtype = np.dtype(spec.dtype)
        count = 1
        for side in spec.shape:
            count *= side
        start += -start % ALIGNMENT
        if start + count * dtype.itemsize > len(payload):
            raise ProtocolError("an array that ends after its frame")
        yield np.frombuffer(payload, dtype, count, start).reshape(spec.shape)
        start += count * dtype.itemsize


# Outputs


@dataclass(slots=True)
class StepOutputs:
    """What one step gave to its requests: plain tokens in two columns, everything else as full outputs.

    A request that gained several plain tokens stands in the columns as often, in order. Its full output, if it has
    one too, comes after them.
    """

    ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # token_ids[i] is for request ids[i]
    full: list[EngineOutput] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ids or self.full)

    def add_token(self, request_id: int, token_id: int) -> None:
        """One more token, and nothing else to say about it."""
        self.ids.append(request_id)
        self.token_ids.append(token_id)

    def add(self, output: EngineOutput) -> None:
        """An output with more than a token: the first one, an end, logprobs, a vector, an error."""
        self.full.append(output)

    def extend(self, outputs: Iterable[EngineOutput]) -> None:
        self.full.extend(outputs)


def encode_outputs(outputs: StepOutputs) -> bytes:
    count, full = len(outputs.ids), outputs.full
    payload = struct.pack(f"<I{count}Q{count}I", count, *outputs.ids, *outputs.token_ids)
    if full:
        vectors = [np.ascontiguousarray(one, np.float32).tobytes() for output in full for one in _vectors(output)]
        header = _encode([_wire_output(output) for output in full])
        payload = b"".join((payload, _COUNT.pack(len(header)), header, *vectors))
    return frame(Kind.OUTPUTS, payload)


def decode_outputs(payload: memoryview) -> StepOutputs:
    """What was given to `encode_outputs`. ProtocolError if the payload is malformed."""
    try:
        count = _COUNT.unpack_from(payload)[0]
        numbers = struct.unpack_from(f"<{count}Q{count}I", payload, 4)
        end = 4 + 12 * count
        full = _full_outputs(payload[end:]) if end < len(payload) else []
    except struct.error as error:
        raise ProtocolError(f"malformed outputs: {error}") from None
    return StepOutputs(list(numbers[:count]), list(numbers[count:]), full)


def _full_outputs(payload: memoryview) -> list[EngineOutput]:
    size = _COUNT.unpack_from(payload)[0]
    start = _COUNT.size + size
    outputs = []
    for wire in decoded(_outputs.decode, payload[_COUNT.size : start]):
        vectors = []
        for shape in wire.vectors:
            vectors.append(np.frombuffer(payload, np.float32, int(np.prod(shape)), start).reshape(shape).copy())
            start += vectors[-1].nbytes
        outputs.append(
            EngineOutput(
                wire.id,
                wire.token_ids,
                wire.finish_reason,
                wire.stop_token_id,
                tuple(TokenLogprob(*one) for one in wire.logprobs),
                tuple(None if one is None else TokenLogprob(*one) for one in wire.prompt_logprobs),
                wire.cached_tokens,
                vectors[0] if vectors else None,
                wire.error,
                *wire.times,
                tuple(vectors[1:]),
            )
        )
    return outputs


def _vectors(output: EngineOutput) -> tuple[NDArray[np.float32], ...]:
    return () if output.vector is None else (output.vector, *output.others)


def _wire_output(output: EngineOutput) -> _Output:
    return _Output(
        output.id,
        output.token_ids,
        output.finish_reason,
        output.stop_token_id,
        tuple((one.token_id, one.logprob, one.top) for one in output.logprobs),
        tuple(None if one is None else (one.token_id, one.logprob, one.top) for one in output.prompt_logprobs),
        output.cached_tokens,
        tuple(one.shape for one in _vectors(output)),
        output.error,
        (output.queue_s, output.prefill_s, output.preemptions),
    )


# Cutting a byte stream into frames


class FrameReader:
    """Turns received bytes into (kind, payload) in order. Payloads are views, valid as long as they are held."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a frame that is not complete yet
        self._have = 0
        self._need = _HEAD.size

    def feed(self, data: bytes) -> list[tuple[int, memoryview]]:
        if self._pieces:
            self._pieces.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        return self._cut(data)

    def _cut(self, data: bytes) -> list[tuple[int, memoryview]]:
        frames = []
        view = memoryview(data)
        start, size = 0, len(data)
        self._need = _HEAD.size
        while size - start >= _HEAD.size:
            length, kind = _HEAD.unpack_from(view, start)
            check_frame_size(length)
            end = start + _HEAD.size + length
            if end > size:
                self._need = end - start
                break
            frames.append((kind, view[start + _HEAD.size : end]))
            start = end
        if start < size:
            self._pieces.append(data[start:])
            self._have = size - start
        return frames


def check_frame_size(size_bytes: int) -> None:
    if size_bytes > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {size_bytes} bytes")


def parse_head(head: Buffer) -> tuple[int, int]:
    """(payload bytes, kind) of the first HEAD_BYTES of a frame."""
    size, kind = _HEAD.unpack(head)
    check_frame_size(size)
    return size, kind


HEAD_BYTES = _HEAD.size
PART_HEAD_BYTES = _ID.size  # of a part's payload
