"""Media of a request, from where they come to what an encoder takes: fetch, key, size, count, decode, process.

Cheap checks run before expensive ones: counts before fetching, sizes before decoding.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sensorium.config import Limits, ServerConfig
from sensorium.errors import MediaError, RequestError, ServerError, UnsupportedModalityError
from sensorium.media.held import RequestBytes
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource, RawMedia
from sensorium.media.turns import Turns
from sensorium.processors.base import Processor
from sensorium.prompt.messages import MediaPart, Message
from sensorium.serving.concurrency import PromptThreads, all_in_order
from sensorium.types import MediaFeatures, Modality
from sensorium.units import MiB

SHORT_PAYLOAD = 64 * 1024  # bytes that are hashed on the event loop
FEATURE_CACHE_BYTES = 64 * MiB
MAX_NAMES = 4096


@dataclass(frozen=True, slots=True)
class MediaTiming:
    """How long one media item took, queueing included. A cached one was only fetched."""

    kind: Modality
    fetch_s: float
    decode_s: float = 0.0
    process_s: float = 0.0
    cached: bool = False
    duration_s: float = 0.0  # the item's own


@dataclass(frozen=True, slots=True)
class Fetched:
    """A media item before it is decoded. `features` are set where the cache has them."""

    raw: RawMedia
    key: bytes
    num_tokens: int
    fetch_s: float
    features: MediaFeatures | None


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """What all media of a request have in common."""

    processor: Processor
    overrides: Mapping[str, Any]  # of the processor, by the request
    tenant: bytes
    salt: bytes


class MediaPipeline:
    """One model's way for media. `limits` are the most items of each kind in one request."""

    def __init__(
        self,
        loader: MediaLoader,
        threads: PromptThreads,
        limits: Mapping[Modality, int],
        workers: int,
        cache_bytes: int = FEATURE_CACHE_BYTES,
    ) -> None:
        self.limits = limits
        self._loader = loader
        self._threads = threads
        self._cache = FeatureCache(cache_bytes)
        self._names = MediaNames(MAX_NAMES)
        # Decoded media are large: no more of them at once than there are workers. One tenant never has all of them.
        self._decoding = Turns(workers + 1, workers)

    def check(self, messages: Sequence[Message], media: Sequence[MediaSource], modalities: frozenset[Modality]) -> None:
        places = [part.kind for message in messages for part in message.content if isinstance(part, MediaPart)]
        if places != [source.kind for source in media]:
            raise ServerError
        self.check_counts(media, modalities)

    def check_counts(self, media: Sequence[MediaSource], modalities: frozenset[Modality]) -> None:
        """RequestError for what the model does not take, and for more than a request may have."""
        counts: Counter[Modality] = Counter()
        for source in media:
            kind = source.kind
            if kind not in modalities:
                raise UnsupportedModalityError(kind, param=source.param, takes=modalities)
            counts[kind] += 1
            if counts[kind] > self.limits[kind]:
                raise RequestError(
                    f"At most {self.limits[kind]} {kind}(s) may be given in one request, but it "
                    f"has {sum(one.kind == kind for one in media)}. The operator sets this with --limit-mm-per-prompt.",
                    param=source.param,
                    code=f"too_many_{kind}s",
                )

    def holding(self) -> AbstractContextManager[RequestBytes]:
        """What `fetch` counts, until the request's media are processed."""
        return self._loader.holding()

    async def fetch(self, sources: Sequence[MediaSource], settings: MediaSettings, held: RequestBytes) -> list[Fetched]:
        """All of them at the same time, each with the tokens that it will take; nothing is decoded yet."""
        sent = [source for source in sources if not source.is_named_only]
        found = await all_in_order(self._fetch(source, settings, held) for source in sent)
        if len(sent) == len(sources):
            return found
        here, fetched = {item.key: item for item in found}, iter(found)
        return [self._named(one, settings, here) if one.is_named_only else next(fetched) for one in sources]

    async def process(
        self, fetched: Sequence[Fetched], settings: MediaSettings
    ) -> tuple[list[MediaFeatures], list[MediaTiming]]:
        """What the encoders take of each item, in order. An item that is given twice is decoded once."""
        first_of = {item.key: item for item in reversed(fetched)}
        made = await all_in_order(self._process(item, settings) for item in first_of.values())
        by_key = dict(zip(first_of, made, strict=True))
        timings = [
            by_key[item.key][1] if first_of[item.key] is item else MediaTiming(item.raw.kind, item.fetch_s, cached=True)
            for item in fetched
        ]
        return [by_key[item.key][0] for item in fetched], timings

    async def _fetch(self, source: MediaSource, settings: MediaSettings, held: RequestBytes) -> Fetched:
        begin = time.perf_counter()
        processor = settings.processor
        raw = await self._loader.fetch(source, settings.tenant, held.add)
        key = await self._threads.run(
            len(raw.payload) <= SHORT_PAYLOAD,
            lambda: feature_key(raw.kind, raw.declared_type, raw.payload, settings.overrides, settings.salt),
            settings.tenant,
        )
        fetch_s = time.perf_counter() - begin
        if source.uuid is not None:
            self._names.put(_name(source, settings), key)
        features = self._cache.get(key)
        if features is not None:
            return Fetched(raw, key, processor.prompt_tokens(features), fetch_s, features)
        size = self._loader.probe(raw, sampling=processor.video_sampling(), sample_rate=processor.sample_rate)
        try:
            count = processor.num_tokens(raw.kind, size.height, size.width, size.frames)
        except MediaError as error:
            error.param = error.param or raw.param
            raise
        return Fetched(raw, key, count, fetch_s, None)

    def _named(self, source: MediaSource, settings: MediaSettings, here: Mapping[bytes, Fetched]) -> Fetched:
        """What the same tenant sent under this name: in this request, or as long as it is kept."""
        key = self._names.get(_name(source, settings))
        if key is not None and key in here:
            return here[key]
        features = None if key is None else self._cache.get(key)
        if key is None or features is None:
            raise MediaError(
                f"No {source.kind} is kept under this `uuid`: send it with its content (again).",
                param=source.param,
                code="unknown_media_uuid",
            )
        count = settings.processor.prompt_tokens(features)
        return Fetched(RawMedia(source.kind, source.param, b""), key, count, 0.0, features)

    async def _process(self, item: Fetched, settings: MediaSettings) -> tuple[MediaFeatures, MediaTiming]:
        kind, processor = item.raw.kind, settings.processor
        duration_s = item.raw.info.duration_s if item.raw.info is not None else 0.0
        if item.features is not None:
            return item.features, MediaTiming(kind, item.fetch_s, cached=True, duration_s=duration_s)
        begin = time.perf_counter()
        how: dict[str, Any] = {
            "sampling": processor.video_sampling(),
            "sample_rate": processor.sample_rate,
            "tenant": settings.tenant,
        }
        async with self._decoding.taken(settings.tenant), self._loader.memory(item.raw, **how):
            decoded = await self._loader.decode(item.raw, **how)
            decoded_s = time.perf_counter()
            features = await self._threads.run(False, lambda: processor.process(decoded), settings.tenant)
        self._cache.put(item.key, features)
        return features, MediaTiming(
            kind, item.fetch_s, decoded_s - begin, time.perf_counter() - decoded_s, duration_s=duration_s
        )


def feature_key(
    kind: Modality, declared_type: str | None, payload: bytes, settings: Mapping[str, Any], salt: bytes
) -> bytes:
    """What a media item's features depend on, each field framed. The declared type decides whether the file is taken.
    `salt` separates tenants: the time of a response would tell one what another has sent."""
    fields = [kind, declared_type, settings, len(payload), salt.hex()]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(b"\0")
    digest.update(payload)
    return digest.digest()


def _name(source: MediaSource, settings: MediaSettings) -> bytes:
    """Stands for a client's name of an item. Names are a tenant's own, even where tenants share caches: a guessed one
    must not show what another has sent."""
    fields = [source.kind, source.uuid, settings.overrides, settings.tenant.hex(), settings.salt.hex()]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()


class MediaNames:
    """Names that clients gave to media -> the `feature_key` of each; the least recently used are forgotten."""

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._keys: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, name: bytes) -> bytes | None:
        if name in self._keys:
            self._keys.move_to_end(name)
        return self._keys.get(name)

    def put(self, name: bytes, key: bytes) -> None:
        self._keys[name] = key
        self._keys.move_to_end(name)
        if len(self._keys) > self._max_names:
            self._keys.popitem(last=False)


class FeatureCache:
    """Processed media that were seen lately, so that a conversation that repeats an image does not decode it again.

    Entries are found by `feature_key` and removed by size in bytes, least recently used first. Used on the event loop
    only.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, MediaFeatures] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: bytes) -> MediaFeatures | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, features: MediaFeatures) -> None:
        size = _size(features)
        if key in self._entries or size > self._max_bytes:
            return
        self._entries[key] = features
        self.size_bytes += size
        while self.size_bytes > self._max_bytes:
            _, forgotten = self._entries.popitem(last=False)
            self.size_bytes -= _size(forgotten)


def _size(features: MediaFeatures) -> int:
    return sum(array.nbytes for array in features.arrays.values())


def media_limits(server: ServerConfig, limits: Limits) -> dict[Modality, int]:
    """Media per request: what --limit-mm-per-prompt says of a kind, else the general limit."""
    general: dict[Modality, int] = {"image": limits.max_images, "video": limits.max_videos, "audio": limits.max_audios}
    return {kind: server.limit_mm_per_prompt.get(kind, count) for kind, count in general.items()}
