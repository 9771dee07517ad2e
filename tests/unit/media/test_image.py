"""Pictures: sizes, formats, colours, orientation, bombs and damage (safety catalogue S13-S16, S19, S21, S23-S28)."""

from __future__ import annotations

import base64
import gzip
import io
import random
import resource
import struct
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.media_support import PARAM, load, refusal
from support.pictures import chunk, data_url, encoded, exif, grey_rows, photo, png

from sensorium.config import Limits
from sensorium.errors import MediaError
from sensorium.media import jpeg
from sensorium.media.header import read_header
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSize, MediaSource, RawMedia, Refusal


def raw(payload: bytes) -> RawMedia:
    return RawMedia("image", PARAM, payload)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
async def test_formats(format: str, loader: MediaLoader) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    payload = encoded(photo(31, 17), format, **options)
    item = await load(loader, data_url(payload))
    assert item.data.shape == (17, 31, 3)
    assert item.data.dtype == np.uint8
    assert not item.data.flags.writeable
    assert loader.probe(raw(payload)) == MediaSize(17, 31)
    with Image.open(io.BytesIO(payload)) as reference:
        np.testing.assert_array_equal(item.data, np.asarray(reference.convert("RGB")))


@pytest.mark.parametrize(
    "width, height", [(20000, 20000), (16384, 16384), (16385, 10), (8000, 5001), (2**31, 2**31), (4294967295, 1)]
)
async def test_size_comes_before_decoding(width: int, height: int, loader: MediaLoader) -> None:
    """S13: nothing of that size is allocated anywhere."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = await refusal(load(loader, data_url(png(width, height))))
    assert error.code in ("image_too_large", "image_too_small")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


@pytest.mark.parametrize(
    "width, height, code",
    [
        (1, 1, "image_too_small"),
        (1, 4, "image_too_small"),
        (3, 1, "image_too_small"),
        (4, 1000, "image_too_large"),
        (1000, 4, "image_too_large"),
        (0, 8, "image_too_small"),
    ],
)
async def test_tiny_and_thin(width: int, height: int, code: str, loader: MediaLoader) -> None:
    """S14."""
    assert (await refusal(load(loader, data_url(png(width, height))))).code == code


async def test_smallest_and_thinnest(loader: MediaLoader) -> None:
    for width, height in ((4, 4), (4, 800), (800, 4)):
        assert (await load(loader, data_url(encoded(photo(width, height))))).data.shape == (height, width, 3)


async def test_forty_megapixels_decode_within_the_workers_memory() -> None:
    """The worst paths: CMYK, and RGBA turned by a quarter; one row more is refused."""
    loader = MediaLoader(Limits(max_image_pixels=6_000_000), workers=1)
    try:
        turned = encoded(Image.new("RGBA", (3000, 2000), (10, 20, 30, 40)), exif=exif(6))
        assert (await load(loader, data_url(turned))).data.shape == (3000, 2000, 3)
        assert (await load(loader, data_url(encoded(Image.new("CMYK", (3000, 2000)), "JPEG")))).data.shape[1] == 3000
        assert (await refusal(load(loader, data_url(png(3000, 2001))))).code == "image_too_large"
    finally:
        await loader.aclose()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
async def test_orientation(orientation: int, format: str, loader: MediaLoader) -> None:
    """S19: what a viewer shows; the probed size is the upright one."""
    options = {"lossless": True} if format == "WEBP" else {}
    stored = photo(40, 24)
    order = "<" if orientation % 2 else ">"
    block = exif(orientation, order) if format == "PNG" else b"Exif\0\0" + exif(orientation, order)
    payload = encoded(stored, format, exif=block, **options)
    with Image.open(io.BytesIO(payload)) as picture:
        reference = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    size = loader.probe(raw(payload))
    assert (size.height, size.width) == reference.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))
    np.testing.assert_array_equal((await load(loader, data_url(payload))).data, reference)


async def test_orientation_behind_a_jpegs_frame(loader: MediaLoader) -> None:
    """The EXIF segment may stand anywhere before the scan."""
    payload = encoded(photo(40, 24), "JPEG", exif=b"Exif\0\0" + exif(6))
    at, scan = payload.index(b"\xff\xe1"), payload.index(b"\xff\xda")
    end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
    moved = payload[:at] + payload[end:scan] + payload[at:end] + payload[scan:]
    assert loader.probe(raw(moved)) == MediaSize(40, 24)
    wanted = (await load(loader, data_url(payload))).data
    np.testing.assert_array_equal((await load(loader, data_url(moved))).data, wanted)


async def test_alpha_is_paper_white(loader: MediaLoader) -> None:
    """S19: RGBA, LA and palette alpha, against the arithmetic."""
    colours = np.asarray(photo(16, 12))
    alpha = np.tile(np.arange(16, dtype=np.uint8) * 17, (12, 1))
    expected = np.rint(colours * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255))
    rgba = Image.fromarray(np.dstack([colours, alpha]))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        got = (await load(loader, data_url(encoded(rgba, format, **options)))).data
        assert np.abs(got.astype(int) - expected).max() <= 1
    grey = Image.fromarray(np.dstack([colours[..., 0], alpha]))
    got = (await load(loader, data_url(encoded(grey)))).data
    expected_grey = np.rint(colours[..., 0] * (alpha / 255) + 255 * (1 - alpha / 255))
    assert np.abs(got.astype(int) - expected_grey[..., None]).max() <= 1
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert ((await load(loader, data_url(encoded(hidden)))).data == 255).all()


async def test_palettes_and_colour_keys(loader: MediaLoader) -> None:
    """S19, S72: the palette and tRNS decide, not the indices."""
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 2
    red_blue, green_grey = bytes([255, 0, 0, 0, 0, 255]), bytes([0, 255, 0, 128, 128, 128])
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    keys = set()
    for palette, alpha, first in (
        (red_blue, b"", (255, 0, 0)),
        (green_grey, b"", (0, 255, 0)),
        (red_blue, b"\x00", (255, 255, 255)),
        (red_blue, b"\x80", (255, 127, 127)),
    ):
        extra = chunk(b"PLTE", palette) + (chunk(b"tRNS", alpha) if alpha else b"")
        item = await load(loader, data_url(png(8, 8, rows, colour=3, extra=extra)))
        assert np.abs(item.data[0, 0].astype(int) - first).max() <= 1
        np.testing.assert_array_equal(item.data[0, 1], list(palette[3:]))
        keys.add(item.key)
    assert len(keys) == 4


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("keyed", [False, True])
async def test_grey_depths(depth: int, keyed: bool, loader: MediaLoader) -> None:
    """S19: 1-bit to 16-bit grey, and one sample value declared transparent."""
    top = (1 << depth) - 1
    samples = np.arange(64).reshape(8, 8) * top // 63
    transparent = int(samples[2, 5])
    extra = chunk(b"tRNS", struct.pack(">H", transparent)) if keyed else b""
    item = await load(loader, data_url(png(8, 8, grey_rows(samples, depth), depth=depth, colour=0, extra=extra)))
    expected = np.rint(samples * 255 / top)
    if keyed:
        expected[samples == transparent] = 255
    np.testing.assert_array_equal(item.data, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("depth", [8, 16])
async def test_colour_key_in_rgb(depth: int, loader: MediaLoader) -> None:
    pixels = np.asarray(photo(8, 8)).astype(np.uint16)
    wide = pixels * (257 if depth == 16 else 1)
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in wide)
    extra = chunk(b"tRNS", struct.pack(">3H", *wide[3, 4]))
    item = await load(loader, data_url(png(8, 8, rows, depth=depth, extra=extra)))
    expected = pixels.copy()
    expected[(pixels == pixels[3, 4]).all(axis=-1)] = 255
    np.testing.assert_array_equal(item.data, expected)


async def test_cmyk_and_one_bit(loader: MediaLoader) -> None:
    cmyk = photo(16, 16).convert("CMYK")
    payload = encoded(cmyk, "JPEG", quality=95)
    with Image.open(io.BytesIO(payload)) as reference:
        expected = np.asarray(reference.convert("RGB"))
    np.testing.assert_array_equal((await load(loader, data_url(payload))).data, expected)
    bits = photo(16, 16).convert("1")
    np.testing.assert_array_equal((await load(loader, data_url(encoded(bits)))).data, np.asarray(bits.convert("RGB")))


async def test_one_text_chunk_cannot_pose_as_transparency(loader: MediaLoader) -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo(8, 8)))
    payload = png(8, 8, rows, extra=chunk(b"tEXt", b"transparency\0nonsense"))
    np.testing.assert_array_equal((await load(loader, data_url(payload))).data, np.asarray(photo(8, 8)))


OTHERS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%BeginBinary: -99\n" * 3,
    "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 64, 64, 8, 3) + bytes(64),
    "fits.gz": gzip.compress(b"SIMPLE  =                    T" + b" " * 2850),
    "fits": b"SIMPLE  =                    T" + b" " * 2850,
    "tiff": b"II*\0\x08\0\0\0" + bytes(64),
    "tiff-be": b"MM\0*\0\0\0\x08" + bytes(64),
    "bigtiff": b"II+\0\x08" + bytes(64),
    "icns": b"icns\0\0\1\0" + bytes(64),
    "ico": b"\0\0\1\0\1\0" + bytes(64),
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(64),
    "emf": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(64),
    "svg": b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg">&x;</svg>',
    "pdf": b"%PDF-1.7\n" + bytes(64),
    "html": b"<!doctype html><html></html>",
    "elf": b"\x7fELF" + bytes(64),
    "jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
    "j2k": b"\xff\x4f\xff\x51" + bytes(64),
    "avif": b"\0\0\0\x1cftypavif" + bytes(64),
    "heic": b"\0\0\0\x18ftypheic" + bytes(64),
    "jxl": b"\xff\x0a" + bytes(64),
    "mp4": b"\0\0\0\x18ftypisom" + bytes(64),
    "dds": b"DDS " + bytes(128),
    "pcx": b"\x0a\5\1\x08" + bytes(128),
    "ppm": b"P6\n8 8\n255\n" + bytes(192),
    "tga": bytes(2) + b"\2" + bytes(64),
    "dib": b"\x28\0\0\0" + bytes(64),
    "zip": b"PK\3\4" + bytes(64),
    "text": b"hello",
    "one byte": b"\xff",
    "bm": b"BM" + bytes(64),
    "m3u8": b"#EXTM3U\nfile:///etc/passwd\n",
    "riff": b"RIFF\0\0\0\0WAVEfmt " + bytes(64),
}


@pytest.mark.parametrize("name", OTHERS)
async def test_other_formats_are_refused_by_their_first_bytes(name: str, loader: MediaLoader) -> None:
    """S16, S21: none of these reaches a decoder."""
    start = time.process_time()
    error = await refusal(load(loader, data_url(OTHERS[name])))
    assert error.code == "unsupported_image_media_type"
    assert time.process_time() - start < 2


def gif_frames(count: int) -> bytes:
    picture = Image.fromarray(np.zeros((16, 16), np.uint8))
    single = encoded(picture, "GIF")
    start = single.index(b"\x2c")
    return single[:start] + single[start:-1] * count + b";"


def apng_frames(count: int) -> bytes:
    rows = bytes(16 * 49)
    control = struct.pack(">IIIIHHBB", 16, 16, 0, 0, 1, 10, 0, 0)
    extra = chunk(b"acTL", struct.pack(">II", count, 0)) + chunk(b"fcTL", struct.pack(">I", 0) + control)
    payload = png(16, 16, rows, extra=extra)
    more = b"".join(
        chunk(b"fcTL", struct.pack(">I", 2 * i - 1) + control)
        + chunk(b"fdAT", struct.pack(">I", 2 * i) + zlib.compress(rows))
        for i in range(1, count)
    )
    return payload[:-12] + more + payload[-12:]


def webp_frames(count: int) -> bytes:
    first, second = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16), (9, 9, 9))
    single = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    start = single.index(b"ANMF")
    body = single[12:start] + single[start:] * (count // 2)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("make", [gif_frames, apng_frames, webp_frames])
async def test_animations_give_their_first_frame(make: object, loader: MediaLoader) -> None:
    """S24."""
    payload = make(10_000)  # type: ignore[operator]
    await loader.warm()
    times = []
    for _ in range(3):
        start = time.monotonic()
        item = await load(loader, data_url(payload))
        times.append(time.monotonic() - start)
    assert min(times) < 10
    assert item.data.shape == (16, 16, 3)
    assert not item.data.any()


@pytest.mark.parametrize(
    "kind, prefix", [(b"zTXt", b"Comment\0\0"), (b"iCCP", b"icc\0\0"), (b"iTXt", b"Comment\0\1\0\0\0")]
)
async def test_compressed_chunk_bombs(kind: bytes, prefix: bytes, loader: MediaLoader) -> None:
    """S25."""
    bomb = chunk(kind, prefix + zlib.compress(bytes(60 << 20), 9))
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo(8, 8)))
    error = await refusal(load(loader, data_url(png(8, 8, rows, extra=bomb))))
    assert error.code == "image_parse_error"


@pytest.mark.parametrize("count", [4000, 12_000])
async def test_many_small_chunk_bombs_end_in_time(count: int) -> None:
    """Each inflates to a megabyte: too many are refused by the header, the others by the deadline."""
    bomb = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1 << 20), 9))
    loader = MediaLoader(Limits(decode_timeout_s=1.0), workers=1)
    loader._images.bounds = replace(loader._images.bounds, deadline_s=300)  # by its processor time, on any machine
    error = await refusal(load(loader, data_url(png(8, 8, extra=bomb * count))))
    assert error.code == "image_parse_error"
    await loader.aclose()


async def test_truncation_and_bit_flips(loader: MediaLoader) -> None:
    """S26: a picture or a 400, and the worker lives on or is replaced."""
    generator = random.Random(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        payload = encoded(photo(48, 32), format)
        for tenth in range(10):
            cut = data_url(payload[: len(payload) * tenth // 10 or 1])
            if format == "PNG" and tenth == 9:  # what is missing is not of the pixels
                np.testing.assert_array_equal((await load(loader, cut)).data, np.asarray(photo(48, 32)))
                continue
            error = await refusal(load(loader, cut))
            assert error.code in ("image_parse_error", "unsupported_image_media_type")
        for _ in range(60):
            damaged = bytearray(payload)
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            try:
                assert (await load(loader, data_url(bytes(damaged)))).data.shape[2] == 3
            except MediaError as error:
                assert error.code.startswith(("image_", "unsupported_image"))
    assert (await load(loader, data_url(encoded(photo(48, 32))))).data.shape == (32, 48, 3)


async def test_declared_type_does_not_matter(loader: MediaLoader) -> None:
    """S28: the bytes decide, always."""
    payload = encoded(photo(16, 16), "JPEG")
    items = [
        await load(loader, data_url(payload, media_type))
        for media_type in ("image/png", "image/jpeg", "image/x-nonsense", "application/octet-stream", "")
    ]
    assert len({item.key for item in items}) == 1
    item = await loader.decode(await loader.fetch(MediaSource("image", PARAM, data=data_url(payload).split(",")[1])))
    assert item.key == items[0].key


async def test_same_pixels_from_two_formats_have_one_key(loader: MediaLoader) -> None:
    """S72."""
    picture = photo(20, 10)
    keys = {
        (await load(loader, data_url(encoded(picture, format, **options)))).key
        for format, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}))
    }
    assert len(keys) == 1


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
            b"RIFF\0\0\0\0WEBPVP8X",
            b"RIFF\0\0\0\0WEBPVP8 ",
            b"GIF89a",
            b"BM" + bytes(12) + b"\x28\0\0\0",
            b"\xff\xd8\xff\xe1\0\x22Exif\0\0II*\0",
        ]
    ),
    st.binary(max_size=300),
)
def test_header_of_anything_is_a_size_or_a_refusal(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest)
    except Refusal:
        return
    assert header.width >= 0
    assert header.height >= 0
    assert 1 <= header.orientation <= 8


def test_header_costs_little_whatever_the_file() -> None:
    """Millions of tiny segments, in each format that has segments."""
    floods = (
        b"\xff\xd8" + b"\xff\xe1\0\2" * 4_000_000,
        b"\xff\xd8" + b"\xff" * 16_000_000,
        b"\xff\xd8" + b"\xff\0" * 8_000_000,
        b"\xff\xd8\xff" + bytes(16_000_000),
        b"\xff\xd8\xff\xe1\0\2" + (bytes(4000) + b"\xff\xe1\0\2") * 4000,
        png(8, 8, extra=chunk(b"tEXt", b"") * 1_000_000),
        b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x08" + bytes(9) + b"ABCD\0\0\0\0" * 2_000_000,
    )
    start = time.process_time()
    for flood in floods:
        try:
            read_header(flood)
        except Refusal as refused:
            assert refused.problem == "parse"
    assert time.process_time() - start < 2


def segments_apart(payload: bytes, junk: bytes, *, places: int = 3) -> bytes:
    """The same JPEG with bytes between its first segments."""
    offset, out = 2, payload[:2]
    for _ in range(places):
        length = 2 + int.from_bytes(payload[offset + 2 : offset + 4], "big")
        out += payload[offset : offset + length] + junk
        offset += length
    return out + payload[offset:]


@pytest.mark.parametrize("junk", [b"\0", b"\xff", b"\0" * 5000, b"\xff\0" * 10, b"DJI \x01\x02", b"\xff\xff\xff\0\0"])
@pytest.mark.parametrize("progressive", [False, True])
async def test_bytes_between_segments(junk: bytes, progressive: bool, loader: MediaLoader) -> None:
    """As drones and phones leave them; the orientation behind them counts as well."""
    for orientation in (1, 6):
        payload = encoded(photo(40, 24), "JPEG", progressive=progressive, exif=b"Exif\0\0" + exif(orientation))
        wanted = (await load(loader, data_url(payload))).data
        found = (await load(loader, data_url(segments_apart(payload, junk)))).data
        np.testing.assert_array_equal(found, wanted)


async def test_stray_bytes_are_bounded(loader: MediaLoader) -> None:
    payload = segments_apart(encoded(photo(40, 24), "JPEG"), bytes(1 << 21), places=1)
    assert (await refusal(load(loader, data_url(payload)))).code == "image_parse_error"


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}, {"optimize": True}, {"restart_marker_blocks": 2}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
async def test_jpegs_without_their_end(mode: str, options: dict[str, object], loader: MediaLoader) -> None:
    """All pixels are there, so they are shown; one byte of theirs less, and the file is cut off."""
    payload = encoded(photo(67, 45).convert(mode), "JPEG", **options)
    wanted = (await load(loader, data_url(payload))).data
    for end in (payload[:-2], payload[:-1], payload + b"behind it"):
        np.testing.assert_array_equal((await load(loader, data_url(end))).data, wanted)
    for cut in (6, 10, 50, len(payload) // 3, len(payload) // 2):
        assert (await refusal(load(loader, data_url(payload[:-cut])))).code == "image_parse_error", cut


async def test_a_flat_jpeg_that_is_cut_off(loader: MediaLoader) -> None:
    """Its missing part would look like the rest of it."""
    for grey in (0, 127, 128, 255):
        payload = encoded(Image.new("RGB", (640, 480), (grey,) * 3), "JPEG")
        assert (await load(loader, data_url(payload[:-2]))).data.shape == (480, 640, 3)
        for cut in (20, 100, 400):
            assert (await refusal(load(loader, data_url(payload[:-cut])))).code == "image_parse_error", (grey, cut)


async def test_a_progressive_jpeg_without_its_last_scans(loader: MediaLoader) -> None:
    """Cut between two scans, with every scan that is there complete."""
    payload = encoded(photo(67, 45), "JPEG", progressive=True)
    starts = [at for at in range(len(payload)) if payload[at : at + 2] == b"\xff\xda"]
    assert len(starts) == 10
    for start in starts[1:]:
        tables = payload.rfind(b"\xff\xc4", 0, start)
        end = tables if tables > starts[starts.index(start) - 1] else start
        assert (await refusal(load(loader, data_url(payload[:end])))).code == "image_parse_error"


def many_scans(count: int, width: int = 64, height: int = 64) -> bytes:
    """A progressive JPEG whose last scan, a refinement, comes `count` times more."""
    payload = encoded(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = payload.rfind(b"\xff\xda")
    return payload[:-2] + payload[last:-2] * count + b"\xff\xd9"


async def test_scans_are_counted_before_decoding(loader: MediaLoader) -> None:
    """A decoder goes over the whole image for each, however short it is."""
    own = jpeg.count_scans(many_scans(0)).count
    await load(loader, data_url(many_scans(jpeg.MAX_SCANS - own)))
    for count in (jpeg.MAX_SCANS - own + 1, 2000, 100_000):
        start = time.process_time()
        error = await refusal(load(loader, data_url(many_scans(count))))
        assert error.code == "image_too_large" and "64 scans" in error.message
        assert time.process_time() - start < 5
    large = many_scans(30, 6000, 6000)
    assert "22 scans" in (await refusal(load(loader, data_url(large)))).message
    frames = b",".join(base64.b64encode(many_scans(70)) for _ in range(2)).decode()
    error = await refusal(load(loader, f"data:video/jpeg;base64,{frames}", "video"))
    assert error.code == "video_too_large"


@pytest.mark.parametrize(
    "frame", [(0, 0, 65535, 65535), (65535, 65535, 1, 1), (0, 0, 13000, 13000), (0, 0, 0, 0), (2, 2, 8, 8)]
)
async def test_a_gif_frame_beyond_its_screen(frame: tuple[int, int, int, int], loader: MediaLoader) -> None:
    """35 bytes: the worker outlives them."""
    payload = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + b"," + struct.pack("<HHHHB", *frame, 0)
    error = await refusal(load(loader, data_url(payload + b"\x02\x02\x4c\x01\0;")))
    assert error.code == "image_parse_error"
