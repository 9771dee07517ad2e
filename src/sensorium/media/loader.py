"""From a request's media sources to decoded, keyed arrays: the one way in, for every endpoint.

Three steps, so that a caller can check counts in between: `fetch` the file, `probe` its size, `decode` it.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx

from sensorium.config import Limits
from sensorium.errors import StartupError
from sensorium.media.address import AllowedHosts
from sensorium.media.costs import (
    Cost,
    audio_cost,
    check_image,
    check_stream,
    frame_list_cost,
    image_cost,
    inspection_cost,
    most_frame_pixels,
    most_video_pixels,
    video_cost,
)
from sensorium.media.fetch import Fetcher, Resolver
from sensorium.media.files import LocalFiles
from sensorium.media.framelist import MEDIA_TYPE, FrameList, frame_list_size, read_frame_list
from sensorium.media.header import ImageHeader, read_header
from sensorium.media.held import HeldBytes, RequestBytes, Take, unbounded
from sensorium.media.inline import decode_base64, is_data_url, split_data_url
from sensorium.media.key import content_key
from sensorium.media.magic import container_of
from sensorium.media.pool import Bounds, Result, WorkerPool
from sensorium.media.sampling import VideoSampling, fitted_size
from sensorium.media.source import CRASHED, PADDING_S, MediaSize, MediaSource, RawMedia, Refusal, StreamInfo
from sensorium.media.turns import Turns
from sensorium.system.heap import HeapTrimmer
from sensorium.system.nursery import Nursery
from sensorium.types import MediaItem, Modality
from sensorium.units import size_text

T = TypeVar("T")
LARGE_TEXT = 256 * 1024  # base64 characters from which decoding leaves the event loop
READERS = 2  # threads for files and base64, which hold the interpreter: more would only keep it from the event loop
SPARE_BYTES = 256 * 1024 * 1024  # of address space, which is more than memory: threads' stacks and arenas
AS_IS = VideoSampling(fps=None)  # every frame, up to the limit
SPEECH_RATE = 16_000


class MediaLoader:
    """One per server. All refusals are MediaError with the source's `param`. `tenant` says whose turn work takes."""

    def __init__(
        self,
        limits: Limits,
        *,
        allowed_domains: tuple[str, ...] = (),
        local_root: Path | None = None,
        workers: int = 2,
        nursery: Nursery | None = None,
        resolve: Resolver | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._limits = limits
        self._memory = Turns(limits.media_memory, limits.media_memory)
        self._trimmer = HeapTrimmer()
        self._held = HeldBytes(limits.max_pending_bytes)
        self._readers = ThreadPoolExecutor(READERS, "media-reader")
        self._reading = Turns(READERS, READERS - 1)
        self._files = _open_root(local_root)
        self._fetcher = Fetcher(
            _parse_domains(allowed_domains),
            timeout_s=limits.fetch_timeout_s,
            max_redirects=limits.max_redirects,
            max_url_length=limits.max_url_length,
            resolve=resolve,
            transport=transport,
        )
        self._images = WorkerPool("image", workers, _image_bounds(limits), nursery)
        self._streams = WorkerPool("stream", workers, _stream_bounds(limits), nursery)
        self._workers = workers
        self._recordings: MediaLoader | None = None

    def holding(self) -> AbstractContextManager[RequestBytes]:
        """For one request: its `add` counts what `fetch` brings from elsewhere, until the context ends."""
        return self._held.open()

    async def fetch(self, source: MediaSource, tenant: bytes = b"", take: Take = unbounded) -> RawMedia:
        """The file behind a source, whole and within its kind's limit; packets of video and audio were counted."""
        with _refusals(source.kind, source.param):
            payload, declared = await self._read(source, tenant, take)
            if not payload:
                raise Refusal("empty", "The {kind}'s file is empty.")
            raw = RawMedia(source.kind, source.param, payload, declared)
            return raw if source.kind == "image" else replace(raw, info=await self._inspect(raw, tenant))

    def probe(self, raw: RawMedia, *, sampling: VideoSampling = AS_IS, sample_rate: int = SPEECH_RATE) -> MediaSize:
        """The size that `decode` will give, checked against the limits. Quick enough for the event loop."""
        with _refusals(raw.kind, raw.param):
            if raw.kind == "image":
                header = self._checked_header(raw.payload)
                check_image(header, len(raw.payload), self._limits.media_memory)
                return MediaSize(*header.upright)
            size = self._stream_size(raw, sampling, sample_rate)
            check_stream(_cost(raw, size), self._limits.media_memory)
            return size

    @asynccontextmanager
    async def memory(
        self, raw: RawMedia, *, sampling: VideoSampling = AS_IS, sample_rate: int = SPEECH_RATE, tenant: bytes = b""
    ) -> AsyncIterator[None]:
        """The memory that decoding and processing this item may take, as soon as the tenant's turn leaves so much. It
        was probed before."""
        with _refusals(raw.kind, raw.param):
            size = MediaSize(0, 0) if raw.kind == "image" else self._stream_size(raw, sampling, sample_rate)
            cost = _cost(raw, size)
        try:
            async with self._memory.taken(tenant, min(cost.total, self._limits.media_memory)):
                yield
        finally:
            self._trimmer.after(cost.total)

    async def decode(
        self, raw: RawMedia, *, sampling: VideoSampling = AS_IS, sample_rate: int = SPEECH_RATE, tenant: bytes = b""
    ) -> MediaItem:
        """Arrays from a worker process; the key is computed here, where no codec has been.

        Audio is mono at `sample_rate`; a video has the frames that `sampling` names, with their times.
        """
        with _refusals(raw.kind, raw.param):
            shape: tuple[int, ...] = ()  # of audio only decoding tells
            if raw.kind == "image":
                shape = (*self._checked_header(raw.payload).upright, 3)
                job = {"op": "image", "max_pixels": self._limits.max_image_pixels}
                result = await self._images.run(_limited(job, _cost(raw, MediaSize(0, 0))), raw.payload, tenant)
            elif raw.kind == "video":
                size = self._sampled_size(_info_of(raw), sampling)
                shape = (size.frames, size.height, size.width, 3)
                result = await self._decode_video(raw, _info_of(raw), sampling, size, tenant)
            else:
                job = {
                    "op": "audio",
                    "demuxer": _info_of(raw).container,
                    "sample_rate": sample_rate,
                    "max_seconds": self._limits.max_audio_seconds,
                }
                size = self._stream_size(raw, sampling, sample_rate)
                result = await self._streams.run(_limited(job, _cost(raw, size)), raw.payload, tenant)
            return await asyncio.to_thread(_as_item, raw, result, shape, sample_rate)

    async def warm(self) -> None:
        """Start a decode worker before the first image comes."""
        await self._images.warm()

    def of_recordings(self) -> MediaLoader:
        """This one for models that take a recording window by window: memory, turns and workers of images are shared,
        recordings may be longer. It is closed with this one."""
        if self._recordings is None:
            own = self._recordings = copy.copy(self)
            own._limits = replace(self._limits, max_audio_seconds=self._limits.max_recording_seconds)
            own._streams = WorkerPool("stream", self._workers, _stream_bounds(own._limits), self._streams.nursery)
        return self._recordings

    async def aclose(self) -> None:
        await self._fetcher.aclose()
        await self._images.aclose()
        await self._streams.aclose()
        if self._recordings is not None:
            await self._recordings._streams.aclose()
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _read(self, source: MediaSource, tenant: bytes, take: Take) -> tuple[bytes, str | None]:
        max_bytes = self._max_bytes(source.kind)
        if source.payload is not None:
            if len(source.payload) > max_bytes:
                raise Refusal("file_size", f"The {{kind}}'s file is larger than {size_text(max_bytes)}.")
            return source.payload, source.format
        url = source.url or (source.data if source.data and is_data_url(source.data) else "")
        scheme = url[:8].partition(":")[0].lower()
        if source.data is not None and not url:
            if source.data[:8].lower().startswith(("http:", "https:")):
                raise Refusal("base64", "The {kind} is base64 here; a URL goes into a part of the type {kind}_url.")
            return await self._from_base64(source.data, max_bytes, tenant), source.format
        if scheme == "data":
            parts = split_data_url(url, source.kind)
            if source.kind == "video" and parts.media_type == MEDIA_TYPE:
                most = self._limits.max_video_frames
                frames = await self._in_thread(tenant, lambda: read_frame_list(parts.text, most, max_bytes))
                return frames, MEDIA_TYPE
            return await self._from_base64(parts.text, max_bytes, tenant), parts.media_type or None
        if scheme == "file":
            payload = await self._in_thread(tenant, lambda: self._files.read(url, max_bytes))
            take(len(payload))
            return payload, None
        if scheme in ("http", "https"):
            fetched = await self._fetcher.get(url, max_bytes, tenant, take)
            return fetched.payload, fetched.content_type
        raise Refusal(
            "url",
            "The {kind} must be an http(s):, data: or (where the operator allows it) file: URL; base64 "
            "is written data:<media type>;base64,<data>.",
        )

    async def _from_base64(self, text: str, max_bytes: int, tenant: bytes) -> bytes:
        if len(text) < LARGE_TEXT:
            return decode_base64(text, max_bytes)
        return await self._in_thread(tenant, lambda: decode_base64(text, max_bytes))

    async def _in_thread(self, tenant: bytes, work: Callable[[], T]) -> T:
        return await self._reading.run(self._readers, tenant, work)

    def _max_bytes(self, kind: Modality) -> int:
        limits = self._limits
        return {"image": limits.max_image_bytes, "video": limits.max_video_bytes, "audio": limits.max_audio_bytes}[kind]

    def _checked_header(self, payload: bytes) -> ImageHeader:
        header, limits = read_header(payload), self._limits
        shortest, longest = sorted((header.width, header.height))
        if shortest < limits.min_image_side:
            raise Refusal(
                "small",
                f"The {{kind}} has {header.width}x{header.height} pixels; each side must have at "
                f"least {limits.min_image_side}.",
            )
        if longest > limits.max_image_side or header.width * header.height > limits.max_image_pixels:
            raise Refusal(
                "large",
                f"The {{kind}} has {header.width}x{header.height} pixels; at most "
                f"{limits.max_image_side} on a side and {limits.max_image_pixels} in all are taken. "
                "Send a smaller one.",
            )
        if longest > limits.max_image_aspect * shortest:
            raise Refusal(
                "large",
                f"The {{kind}} has {header.width}x{header.height} pixels: its longest side may be "
                f"at most {limits.max_image_aspect:g} times its shortest. Crop it.",
            )
        return header

    async def _inspect(self, raw: RawMedia, tenant: bytes) -> StreamInfo:
        """Count a stream's packets in a worker; its answer is checked like any other input."""
        if isinstance(packed := raw.payload, FrameList):
            frames, height, width = await self._in_thread(tenant, lambda: frame_list_size(packed))
            return self._checked_info(StreamInfo("frames", float(frames), frames, height, width))
        demuxer = container_of(raw.kind, raw.payload)
        frame_pixels = most_frame_pixels(self._limits) if raw.kind == "video" else 0
        cost = inspection_cost(len(raw.payload), frame_pixels)
        check_stream(cost, self._limits.media_memory)
        job = {"op": f"{raw.kind}_info", "demuxer": demuxer, **self._frame_limits()}
        async with self._memory.taken(tenant, cost.total):
            record = (await self._streams.run(_limited(job, cost), raw.payload, tenant)).record
        if raw.kind == "audio":
            info = StreamInfo(demuxer, _number(record, "duration_s"))
        else:
            info = StreamInfo(
                demuxer,
                _number(record, "duration_s"),
                *(int(_number(record, name)) for name in ("frames", "height", "width")),
            )
        return self._checked_info(info)

    def _checked_info(self, info: StreamInfo) -> StreamInfo:
        limits = self._limits
        max_seconds = limits.max_video_seconds if info.frames else limits.max_audio_seconds
        if info.duration_s > max_seconds + PADDING_S and info.container != "frames":
            raise Refusal("long", f"The {{kind}} is longer than {max_seconds:g} s. Send it in parts.")
        if info.frames and min(info.height, info.width) < limits.min_image_side:
            raise Refusal(
                "small",
                f"The {{kind}}'s frames have {info.width}x{info.height} pixels; each side must have "
                f"at least {limits.min_image_side}.",
            )
        if info.frames and max(info.height, info.width) > limits.max_video_side:
            raise Refusal(
                "large",
                f"The {{kind}}'s frames have {info.width}x{info.height} pixels; at most "
                f"{limits.max_video_side} on a side are taken. Send a smaller one.",
            )
        return info

    def _frame_limits(self) -> dict[str, int]:
        return {"max_side": self._limits.max_video_side, "max_frame_pixels": most_frame_pixels(self._limits)}

    def _stream_size(self, raw: RawMedia, sampling: VideoSampling, sample_rate: int) -> MediaSize:
        info = _info_of(raw)
        if raw.kind == "audio":
            return MediaSize(1, 1, max(1, round(info.duration_s * sample_rate)))
        return self._sampled_size(info, sampling)

    def _sampled_size(self, info: StreamInfo, sampling: VideoSampling) -> MediaSize:
        max_pixels = most_video_pixels(self._limits)
        if info.container == "frames":
            if info.frames * info.height * info.width > max_pixels:
                raise Refusal(
                    "large",
                    f"The {{kind}}'s frames have more than {max_pixels} pixels together. Send fewer or smaller ones.",
                )
            return MediaSize(info.height, info.width, info.frames)
        frames = len(sampling.indices(info.frames, info.duration_s, self._limits.max_video_frames))
        return MediaSize(*fitted_size(info.height, info.width, frames, max_pixels), frames)

    async def _decode_video(
        self, raw: RawMedia, info: StreamInfo, sampling: VideoSampling, size: MediaSize, tenant: bytes
    ) -> Result:
        limits = self._limits
        if info.container == "frames":
            job = {"op": "frames", "height": size.height, "width": size.width, "max_pixels": limits.max_video_pixels}
            result = await self._images.run(_limited(job, _cost(raw, size)), raw.payload, tenant)
            return replace(result, record={"timestamps_s": list(range(size.frames))})  # one a second
        job = {
            "op": "video",
            "demuxer": info.container,
            "sampling": sampling.as_record(),
            **self._frame_limits(),
            "max_frames": limits.max_video_frames,
            "max_pixels": most_video_pixels(limits),
        }
        return await self._streams.run(_limited(job, _cost(raw, size)), raw.payload, tenant)


@contextmanager
def _refusals(kind: Modality, param: str) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        raise refusal.as_error(kind, param) from None


def _cost(raw: RawMedia, size: MediaSize) -> Cost:
    """`size` is of no account for images, whose header says all."""
    if raw.kind == "image":
        return image_cost(read_header(raw.payload), len(raw.payload))
    info = _info_of(raw)
    if raw.kind == "audio":
        return audio_cost(size.frames, len(raw.payload))
    if info.container == "frames":
        return frame_list_cost(info, len(raw.payload))
    return video_cost(info, size, len(raw.payload))


def _limited(job: dict[str, Any], cost: Cost) -> dict[str, Any]:
    return {**job, "memory_bytes": cost.worker + SPARE_BYTES}


def _info_of(raw: RawMedia) -> StreamInfo:
    if raw.info is None:
        raise Refusal("parse", CRASHED)
    return raw.info


def _number(record: dict[str, Any], name: str) -> float:
    """A worker's figure: finite, not negative, not absurd."""
    value = record.get(name)
    if not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise Refusal("parse", CRASHED)
    return value


def _as_item(raw: RawMedia, result: Result, shape: tuple[int, ...], sample_rate: int) -> MediaItem:
    """The shape was known before; for audio (shape ()) only that it is one row."""
    data, times = result.data, result.record.get("timestamps_s", [])
    if data is None or (data.shape != shape if shape else data.ndim != 1 or not data.size):
        raise Refusal("parse", CRASHED)
    if raw.kind == "video" and not _are_times(times, len(data)):
        raise Refusal("parse", CRASHED)
    timestamps_s = tuple(map(float, times)) if raw.kind == "video" else ()
    rate = sample_rate if raw.kind == "audio" else 0
    key = content_key(raw.kind, data, timestamps_s=timestamps_s, sample_rate=rate)
    duration_s = raw.info.duration_s if raw.info is not None and raw.kind == "video" else 0.0
    return MediaItem(raw.kind, data, key, raw.param, rate, timestamps_s, duration_s)


def _are_times(times: object, count: int) -> bool:
    return (
        isinstance(times, list)
        and len(times) == count
        and all(isinstance(time, int | float) and math.isfinite(time) for time in times)
    )


def _clock_s(cpu_s: float) -> float:
    """How long so much processor time may take beside other work."""
    return 3 * cpu_s + 5


def _image_bounds(limits: Limits) -> Bounds:
    return Bounds(
        cpu_s=limits.decode_timeout_s,
        deadline_s=_clock_s(limits.decode_timeout_s),
        result_bytes=3 * max(limits.max_image_pixels, limits.max_video_pixels),
        memory_bytes=limits.media_memory + SPARE_BYTES,
    )


def _stream_bounds(limits: Limits) -> Bounds:
    return Bounds(
        cpu_s=limits.decode_timeout_s,
        deadline_s=_clock_s(limits.decode_timeout_s),
        result_bytes=max(3 * limits.max_video_pixels, 4 * int(limits.max_audio_seconds + 1) * 192_000),
        memory_bytes=limits.media_memory + SPARE_BYTES,
    )


def _open_root(root: Path | None) -> LocalFiles:
    try:
        return LocalFiles(root)
    except OSError:
        raise StartupError(f"--allowed-local-media-path: {root} is not a folder that can be read.") from None


def _parse_domains(domains: tuple[str, ...]) -> AllowedHosts:
    try:
        return AllowedHosts.parse(domains)
    except ValueError as error:
        raise StartupError(f"--allowed-media-domains: {error}.") from None
