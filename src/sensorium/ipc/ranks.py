"""What rank 0 and its followers say to each other: who they are, what they have, and every step's plan.

The frames are those of `messages`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensorium.ipc import messages
from sensorium.ipc.messages import ArraySpec, Kind, Media
from sensorium.types import MediaFeatures, Modality

Arrays: TypeAlias = dict[str, NDArray[Any]]


class RankOf(msgspec.Struct, array_like=True, frozen=True):
    """To a follower, behind the configuration."""

    rank: int
    size: int
    store: str  # file where the ranks meet


class Loaded(msgspec.Struct, array_like=True, frozen=True):
    """From a follower whose weights are there."""

    weight_bytes: int
    available_bytes: int  # for a KV cache


class CacheSize(msgspec.Struct, array_like=True, frozen=True):
    """To a follower: the cache that all ranks have, each for its heads."""

    num_blocks: int
    num_slots: int


class StepPlan(msgspec.Struct, array_like=True, frozen=True):
    """A step without its arrays, whose names and specs stand in their order."""

    query_lens: list[int]
    context_lens: list[int]
    num_decodes: int
    block_size: int
    needed_states: Literal["all", "first", "last"]
    unseen: list[int] | None
    segments: tuple[list[int], int] | None  # lengths of runs, and how many of one token there are
    num_tables: int
    num_media_tokens: int  # whose embeddings are rank 0's to say
    adapters: tuple[int, ...] = ()  # numbers
    names: tuple[str, ...] = ()
    arrays: tuple[ArraySpec, ...] = ()


class _Job(msgspec.Struct, array_like=True, frozen=True):
    """To a follower: media for its towers. Their arrays follow."""

    number: int
    kind: Modality
    media: tuple[Media, ...]
    arrays: tuple[ArraySpec, ...]


class _Piece(msgspec.Struct, array_like=True, frozen=True):
    macs: int
    error: str
    dtype: str
    arrays: tuple[ArraySpec, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """From a follower whose towers have come as far as they were told to."""

    macs: int  # multiply-adds of the next piece; 0: there is none
    error: str = ""  # what they failed with, or ""
    dtype: str = ""
    rows: list[NDArray[np.uint8]] = field(default_factory=list)  # of each item, in bytes, once all are computed


_encode = msgspec.msgpack.Encoder().encode
_rank = msgspec.msgpack.Decoder(RankOf)
_loaded = msgspec.msgpack.Decoder(Loaded)
_cache = msgspec.msgpack.Decoder(CacheSize)
_plan = msgspec.msgpack.Decoder(StepPlan)
_job = msgspec.msgpack.Decoder(_Job)
_piece = msgspec.msgpack.Decoder(_Piece)
_number = msgspec.msgpack.Decoder(int)


def encode_rank(one: RankOf) -> bytes:
    return messages.frame(Kind.RANK, _encode(one))


def decode_rank(payload: messages.Buffer) -> RankOf:
    return messages.decoded(_rank.decode, payload)


def encode_loaded(one: Loaded) -> bytes:
    return messages.frame(Kind.LOADED, _encode(one))


def decode_loaded(payload: messages.Buffer) -> Loaded:
    return messages.decoded(_loaded.decode, payload)


def encode_cache(one: CacheSize) -> bytes:
    return messages.frame(Kind.CACHE, _encode(one))


def decode_cache(payload: messages.Buffer) -> CacheSize:
    return messages.decoded(_cache.decode, payload)


def encode_step(plan: StepPlan, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    values = list(arrays.values())
    plan = msgspec.structs.replace(plan, names=tuple(arrays), arrays=messages.specs_of(values))
    return b"".join(messages.with_arrays(Kind.STEP, _encode(plan), values))


def decode_step(payload: memoryview) -> tuple[StepPlan, Arrays]:
    """The arrays are views of the payload."""
    plan, start = messages.with_header(_plan.decode, payload)
    return plan, dict(zip(plan.names, messages.arrays_of(payload, start, plan.arrays), strict=True))


def encode_logits(rows: NDArray[np.int64] | None) -> bytes:
    """Of these rows of the last step; None: of all."""
    return messages.frame(Kind.LOGITS, b"" if rows is None else rows.tobytes())


def decode_logits(payload: messages.Buffer) -> NDArray[np.int64] | None:
    return np.frombuffer(payload, np.int64) if len(payload) else None


def encode_media(number: int, kind: Modality, items: Sequence[MediaFeatures]) -> bytes:
    arrays = [array for one in items for array in one.arrays.values()]
    header = _encode(_Job(number, kind, tuple(map(messages.media_header, items)), messages.specs_of(arrays)))
    return b"".join(messages.with_arrays(Kind.ENCODE, header, arrays))


def decode_media(payload: memoryview) -> tuple[int, Modality, list[MediaFeatures]]:
    """The arrays are views of the payload."""
    job, start = messages.with_header(_job.decode, payload)
    arrays = iter(messages.arrays_of(payload, start, job.arrays))
    return job.number, job.kind, list(messages.features_of(job.media, arrays))


def encode_advance(number: int) -> bytes:
    return messages.frame(Kind.ADVANCE, _encode(number))


def encode_forget(number: int) -> bytes:
    return messages.frame(Kind.FORGET, _encode(number))


def decode_job(payload: messages.Buffer) -> int:
    return messages.decoded(_number.decode, payload)


def encode_rows(found: Encoded) -> bytes:
    header = _encode(_Piece(found.macs, found.error, found.dtype, messages.specs_of(found.rows)))
    return b"".join(messages.with_arrays(Kind.ENCODED, header, found.rows))


def decode_rows(payload: memoryview) -> Encoded:
    piece, start = messages.with_header(_piece.decode, payload)
    return Encoded(piece.macs, piece.error, piece.dtype, list(messages.arrays_of(payload, start, piece.arrays)))


def encode_beat(*, works: bool) -> bytes:
    """From a follower; `works`: it is in a step, and not waiting for other ranks."""
    return messages.frame(Kind.BEAT, b"\1" if works else b"\0")
