"""Memory of media: what a header promises is what decoding takes, and no more is decoded at a time than fits."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.clips import sound, tone
from support.media_support import PARAM, load, refusal
from support.pictures import data_url, encoded, photo

from sensorium.config import Limits
from sensorium.errors import BodyTooLargeError, OverloadedError
from sensorium.media.costs import audio_cost, image_cost
from sensorium.media.header import read_header
from sensorium.media.held import HeldBytes
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource
from sensorium.types import MediaItem, Modality
from sensorium.units import MiB

SIDE = 2000


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noisy(mode: str) -> Image.Image:
    """Noise in tiles, which is quick to make and to compress, and whose coefficients are not zero."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (50, SIDE, 4), dtype=np.uint8)
    return Image.fromarray(np.tile(tile, (SIDE // 50, 1, 1)), "RGBA").convert(mode)


FILES = {
    "JPEG": lambda: saved(noisy("RGB"), "JPEG"),
    "progressive JPEG": lambda: saved(noisy("RGB"), "JPEG", progressive=True, subsampling=0),
    "CMYK JPEG": lambda: saved(noisy("CMYK"), "JPEG", progressive=True, quality=95),
    "JPEG without its end": lambda: saved(noisy("RGB"), "JPEG")[:-2],
    "turned JPEG": lambda: saved(
        noisy("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06" + bytes(6)
    ),
    "PNG": lambda: saved(noisy("RGB"), "PNG", compress_level=1),
    "PNG with alpha": lambda: saved(noisy("RGBA"), "PNG", compress_level=1),
    "grey PNG with alpha": lambda: saved(noisy("LA"), "PNG", compress_level=1),
    "palette PNG": lambda: saved(noisy("RGB").quantize(200), "PNG", compress_level=1, transparency=3),
    "16-bit PNG": lambda: saved(Image.fromarray(np.asarray(noisy("L"), np.uint16) * 257), "PNG", compress_level=1),
    "BMP": lambda: saved(noisy("RGB"), "BMP"),
    "GIF": lambda: saved(noisy("L"), "GIF"),
    "WebP": lambda: saved(noisy("RGB"), "WEBP", method=0),
    "lossless WebP": lambda: saved(noisy("RGBA"), "WEBP", lossless=True, method=0, quality=0),
}


def resident_bytes(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name))


async def growth(loader: MediaLoader, pids: list[int], url: str, kind: Modality) -> tuple[int, MediaItem]:
    """By how much the worker that decoded it has grown at most."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark starts anew
    before = {pid: resident_bytes(pid, "VmRSS") for pid in pids}
    item = await load(loader, url, kind)
    return max(resident_bytes(pid, "VmHWM") - before[pid] for pid in pids), item


@pytest.mark.parametrize("name", FILES)
async def test_a_worker_takes_no_more_than_its_header_says(name: str, loader: MediaLoader) -> None:
    payload = FILES[name]()
    await load(loader, data_url(encoded(photo(8, 8), "PNG")))
    pids = loader._images.pids
    first, item = await growth(loader, pids, data_url(payload), "image")
    again, _ = await growth(loader, pids, data_url(payload), "image")
    assert item.data.shape == (SIDE, SIDE, 3)
    assert loader._images.pids == pids
    assert first > SIDE * SIDE  # the second may find memory that the worker still holds
    # Pages of its program that the system had taken away come back with the first.
    assert min(first, again) <= image_cost(read_header(payload), len(payload)).worker


async def test_audio_takes_no_more_than_it_says(loader: MediaLoader) -> None:
    payload = sound(tone(60.0, 16000), 16000)
    await load(loader, data_url(sound(tone(0.5, 16000), 16000), "audio/wav"), "audio")
    first, item = await growth(loader, loader._streams.pids, data_url(payload, "audio/wav"), "audio")
    again, _ = await growth(loader, loader._streams.pids, data_url(payload, "audio/wav"), "audio")
    assert len(item.data) == 60 * 16000
    assert first > 4 * 60 * 16000
    assert min(first, again) <= audio_cost(60 * 16000, len(payload)).worker


async def test_what_would_never_fit_is_refused_with_what_would() -> None:
    loader = MediaLoader(Limits(media_memory=60 * MiB), workers=1)
    try:
        for file, most in ((saved(Image.new("RGB", (3000, 2000)), "PNG"), 4_900_000), (None, 2_300_000)):
            payload = file or saved(Image.new("RGB", (3000, 1000)), "WEBP")
            error = await refusal(load(loader, data_url(payload)))
            assert error.code == "image_too_large"
            assert "60 MiB for media" in error.message
            named = int(error.message.partition("at most ")[2].split()[0])
            assert most < named < 1.1 * most
        assert (await load(loader, data_url(saved(Image.new("RGB", (2200, 2200)), "PNG")))).data.shape[0] == 2200
        error = await refusal(load(loader, data_url(sound(tone(200.0, 16000), 16000), "audio/wav"), "audio"))
        assert error.code == "audio_too_large" and "60 MiB for media" in error.message
    finally:
        await loader.aclose()


async def test_no_more_is_decoded_at_a_time_than_fits() -> None:
    """And every one of them comes to its turn."""
    loader = MediaLoader(Limits(media_memory=40 * MiB), workers=4)
    payload = saved(Image.new("RGB", (1000, 1000)), "PNG")
    cost = image_cost(read_header(payload), len(payload)).total
    held, most = 0, 0

    async def one(tenant: bytes) -> None:
        nonlocal held, most
        raw = await loader.fetch(MediaSource("image", PARAM, url=data_url(payload)))
        async with loader.memory(raw, tenant=tenant):
            held += cost
            most = max(most, held)
            await asyncio.sleep(0.01)
            held -= cost

    await asyncio.gather(*(one(bytes([number % 3])) for number in range(9)))
    assert most == 2 * cost <= 40 * MiB < 3 * cost
    await loader.aclose()


def test_fetched_files_are_bounded_together() -> None:
    held = HeldBytes(100)
    with held.open() as first:
        first.add(60)
        first.add(30)
        with held.open() as second:
            second.add(10)
            with pytest.raises(OverloadedError):
                second.add(1)
            with pytest.raises(BodyTooLargeError, match="together"):
                first.add(11)
        assert held.total == 90
    assert held.total == 0
