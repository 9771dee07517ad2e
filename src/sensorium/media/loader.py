"""From a request's media sources to decoded, keyed arrays: the one way in, for every endpoint.

Three steps, so that a caller can check counts in between: `fetch` the file, `probe` its header, `decode` it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from sensorium.config import Limits
from sensorium.errors import StartupError
from sensorium.media.address import AllowedHosts
from sensorium.media.fetch import Fetcher, Resolver
from sensorium.media.files import LocalFiles
from sensorium.media.header import ImageHeader, read_header
from sensorium.media.inline import decode_base64, split_data_url
from sensorium.media.key import content_key
from sensorium.media.pool import Bounds, Result, WorkerPool
from sensorium.media.source import MediaSize, MediaSource, RawMedia, Refusal
from sensorium.types import MediaItem, Modality

LARGE_TEXT = 256 * 1024  # base64 characters from which decoding leaves the event loop
IMAGE_BYTES_PER_PIXEL = 20  # peak of the worst path: CMYK or RGBA, its white sheet, RGB and a turned copy
SPARE_BYTES = 192 * 1024 * 1024


class MediaLoader:
    """One per server. All refusals are MediaError with the source's `param`."""

    def __init__(self, limits: Limits, *, allowed_domains: tuple[str, ...] = (), local_root: Path | None = None,
                 workers: int = 2, resolve: Resolver | None = None,
                 transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._limits = limits
        self._files = _open_root(local_root)
        self._fetcher = Fetcher(_parse_domains(allowed_domains), timeout_s=limits.fetch_timeout_s,
                                max_redirects=limits.max_redirects, max_url_length=limits.max_url_length,
                                resolve=resolve, transport=transport)
        self._images = WorkerPool("image", workers, Bounds(
            deadline_s=limits.decode_timeout_s, result_bytes=3 * limits.max_image_pixels,
            memory_bytes=IMAGE_BYTES_PER_PIXEL * limits.max_image_pixels + limits.max_image_bytes + SPARE_BYTES))

    async def fetch(self, source: MediaSource) -> RawMedia:
        """The file behind a source, whole and within its kind's limit."""
        with _refusals(source.kind, source.param):
            payload, declared = await self._read(source)
            if not payload:
                raise Refusal("empty", "The {noun}'s file is empty.")
            return RawMedia(source.kind, source.param, payload, declared)

    def probe(self, raw: RawMedia) -> MediaSize:
        """Size from the header alone, checked against the limits. Quick enough for the event loop."""
        with _refusals(raw.kind, raw.param):
            height, width = self._checked_header(raw.payload).upright
            return MediaSize(height, width)

    async def decode(self, raw: RawMedia) -> MediaItem:
        """Pixels from a worker process; the key is computed here, where no codec has been."""
        with _refusals(raw.kind, raw.param):
            height, width = self._checked_header(raw.payload).upright
            result = await self._images.run({"op": "image"}, raw.payload)
        return await asyncio.to_thread(_image_item, raw, result, (height, width, 3))

    async def warm(self) -> None:
        """Start a decode worker before the first picture comes."""
        await self._images.warm()

    async def aclose(self) -> None:
        await self._fetcher.aclose()
        await self._images.aclose()

    async def _read(self, source: MediaSource) -> tuple[bytes, str | None]:
        max_bytes = self._max_bytes(source.kind)
        url = source.url or ""
        scheme = url[:8].partition(":")[0].lower()
        if source.data is not None and source.url is None:
            return await _from_base64(source.data, max_bytes), source.format
        if scheme == "data":
            parts = split_data_url(url, source.kind)
            return await _from_base64(parts.text, max_bytes), parts.media_type or None
        if scheme == "file":
            return await asyncio.to_thread(self._files.read, url, max_bytes), None
        if scheme in ("http", "https"):
            fetched = await self._fetcher.get(url, max_bytes)
            return fetched.payload, fetched.content_type
        raise Refusal("url", "The {noun} must be an http(s):, data: or (where the operator allows it) file: URL.")

    def _max_bytes(self, kind: Modality) -> int:
        limits = self._limits
        return {"image": limits.max_image_bytes, "video": limits.max_video_bytes, "audio": limits.max_audio_bytes}[kind]

    def _checked_header(self, payload: bytes) -> ImageHeader:
        header, limits = read_header(payload), self._limits
        shortest, longest = sorted((header.width, header.height))
        if shortest < limits.min_image_side:
            raise Refusal("small", f"The {{noun}} has {header.width}x{header.height} pixels; each side must have at "
                                   f"least {limits.min_image_side}.")
        if longest > limits.max_image_side or header.width * header.height > limits.max_image_pixels:
            raise Refusal("large", f"The {{noun}} has {header.width}x{header.height} pixels; at most "
                                   f"{limits.max_image_side} on a side and {limits.max_image_pixels} in all are taken. "
                                   "Send a smaller one.")
        if longest > limits.max_image_aspect * shortest:
            raise Refusal("large", f"The {{noun}} has {header.width}x{header.height} pixels: its longest side may be "
                                   f"at most {limits.max_image_aspect:g} times its shortest. Crop it.")
        return header


@contextmanager
def _refusals(kind: Modality, param: str) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        raise refusal.as_error(kind, param) from None


async def _from_base64(text: str, max_bytes: int) -> bytes:
    if len(text) < LARGE_TEXT:
        return decode_base64(text, max_bytes)
    return await asyncio.to_thread(decode_base64, text, max_bytes)


def _image_item(raw: RawMedia, result: Result, shape: tuple[int, ...]) -> MediaItem:
    data = result.data
    if data is None or data.shape != shape:
        raise Refusal("parse", "The {noun} could not be decoded.").as_error(raw.kind, raw.param)
    return MediaItem("image", data, content_key("image", data), raw.param)


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
