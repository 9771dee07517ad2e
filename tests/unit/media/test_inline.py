"""data: URLs and base64 (safety catalogue S27, S28) and limits on bytes."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from support.clips import wav
from support.media_support import PARAM, load, refusal
from support.pictures import data_url, encoded, photo

from sensorium.config import Limits
from sensorium.media import inline
from sensorium.media.inline import split_data_url
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource, Refusal

PNG = encoded(photo(8, 8))
TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT}",
        f"data:IMAGE/PNG;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        "data:image/png;base64," + "\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)),
        "data:image/png;base64," + "%0D%0A".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)),
        f"data:image/png;base64, {TEXT} \r\n",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:image/svg+xml;base64,{TEXT}",
    ],
    ids=str,
)
async def test_accepted_forms(url: str, loader: MediaLoader) -> None:
    assert (await loader.fetch(MediaSource("image", PARAM, url=url))).payload == PNG


@pytest.mark.parametrize(
    "url, code",
    [
        (f"data:image/png;base64,{TEXT[:-4]}!!!!", "invalid_base64_image"),
        (f"data:image/png;base64,{TEXT[:40]}*{TEXT[41:]}", "invalid_base64_image"),
        (f"data:image/png;base64,{TEXT.rstrip('=')[:-1]}", "invalid_base64_image"),
        (f"data:image/png;base64,{TEXT}=", "invalid_base64_image"),
        (f"data:image/png;base64,{TEXT[:8]}===={TEXT[8:]}", "invalid_base64_image"),
        (f"data:image/png;base64,{TEXT[:8]}ä{TEXT[9:]}", "invalid_base64_image"),
        ("data:image/png;base64,-_-_", "invalid_base64_image"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png;base64,  \n", "empty_image_file"),
        ("data:image/png,raw", "invalid_base64_image"),
        ("data:,", "invalid_base64_image"),
        (f"data:image/png;base64{TEXT}", "invalid_image_url"),
        ("data:", "invalid_image_url"),
        ("data", "invalid_image_url"),
        (TEXT, "invalid_image_url"),
        ("data:image/png;" + "x" * 1000 + f";base64,{TEXT}", "invalid_image_url"),
        (f"data:text/html;base64,{TEXT}", "unsupported_image_media_type"),
        (f"data:video/mp4;base64,{TEXT}", "unsupported_image_media_type"),
        ("data:image/png;base64," + base64.b64encode(b"<html>").decode(), "unsupported_image_media_type"),
    ],
)
async def test_refused_forms(url: str, code: str, loader: MediaLoader) -> None:
    assert (await refusal(load(loader, url))).code == code


def forms(text: str) -> list[str]:
    """The same in ways that are tolerated; pieces end in all places of a line break, an escape and a quantum."""
    return [
        text,
        " " + text,
        text + "\r\n",
        quote(text, safe=""),
        *("\n".join(text[i : i + width] for i in range(0, len(text), width)) for width in (1, 3, 76)),
        *("%0D%0A".join(text[i : i + width] for i in range(0, len(text), width)) for width in (2, 75)),
    ]


@pytest.mark.parametrize("chars", [4, 5, 6, 7, 64, 1 << 18])
def test_base64_is_decoded_in_pieces_of_any_size(chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "PIECE_CHARS", chars)
    for size in (1, 2, 3, 4, 5, 6, 50, 301):
        payload = bytes(range(251, 251 - size, -1)) if size < 250 else bytes(size)
        text = base64.b64encode(payload).decode()
        for form in forms(text):
            assert inline.decode_base64(form, size) == payload
        for bad in (
            text + "=",
            text + "A",
            text + text if "=" in text else text + "!",
            text[:-1],
            "=" + text,
            text.replace("=", "") + "===",
            text + "%",
            text + "%2541",
            text + "\u00e4",
            "%25" + text,
        ):
            with pytest.raises(Refusal) as refused:
                inline.decode_base64(bad, 1000)
            assert refused.value.problem == "base64", bad


async def test_size_is_known_before_decoding() -> None:
    loader = MediaLoader(Limits(max_image_bytes=3000))
    for payload, whole in ((bytes(3000), True), (bytes(3001), False), (bytes(300_000), False)):
        for wrap in (str, lambda text: "\n".join(text[i : i + 60] for i in range(0, len(text), 60)), quote):
            url = "data:image/png;base64," + wrap(base64.b64encode(payload).decode())
            awaitable = loader.fetch(MediaSource("image", PARAM, url=url))
            if whole:
                assert (await awaitable).payload == payload
            else:
                assert (await refusal(awaitable)).code == "image_file_too_large"
    await loader.aclose()


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
async def test_bare_base64(kind: str, loader: MediaLoader) -> None:
    """`input_audio`'s data, with the declared format kept as a hint only."""
    if kind == "image":
        raw = await loader.fetch(MediaSource("image", PARAM, data=TEXT, format="wav"))
        assert (raw.payload, raw.declared_type) == (PNG, "wav")
    error = await refusal(loader.fetch(MediaSource(kind, PARAM, data="%%%")))  # type: ignore[arg-type]
    assert error.code == f"invalid_base64_{kind}"


async def test_declared_types_of_sound(loader: MediaLoader) -> None:
    for media_type in ("audio/ogg", "audio/mpeg", "video/mp4", "application/ogg", ""):
        assert split_data_url(data_url(PNG, media_type), "audio").media_type == media_type
    error = await refusal(loader.fetch(MediaSource("audio", PARAM, url=data_url(PNG, "image/png"))))
    assert error.code == "unsupported_audio_media_type"


@pytest.mark.parametrize(
    "head",
    [
        "data:;base64,",
        "data:audio/wav;base64,",
        "DATA:audio/wav;BASE64,",
        "data:audio/webm;codecs=opus;base64,",
        "data:application/octet-stream;base64,",
    ],
)
async def test_data_urls_in_place_of_bare_base64(head: str, loader: MediaLoader) -> None:
    """Many clients write a whole data: URL into `input_audio.data`."""
    payload = wav(bytes(3200))
    text = base64.b64encode(payload).decode()
    for data in (head + text, text):
        assert (await loader.fetch(MediaSource("audio", PARAM, data=data, format="wav"))).payload == payload


@pytest.mark.parametrize(
    "data, code",
    [
        (data_url(PNG, "image/png"), "unsupported_audio_media_type"),
        ("data:audio/wav;base64,!!!!", "invalid_base64_audio"),
        ("data:audio/wav,raw", "invalid_base64_audio"),
        ("data:audio/wav;base64", "invalid_audio_url"),
        ("data:audio/wav;base64,", "empty_audio_file"),
        ("https://example.org/a.wav", "invalid_base64_audio"),
        ("file:///etc/passwd", "invalid_base64_audio"),
    ],
)
async def test_other_urls_are_no_base64(data: str, code: str, loader: MediaLoader) -> None:
    assert (await refusal(loader.fetch(MediaSource("audio", PARAM, data=data)))).code == code


async def test_the_refusal_says_how_it_is_written(loader: MediaLoader) -> None:
    error = await refusal(loader.fetch(MediaSource("audio", PARAM, data="https://example.org/a.wav")))
    assert "audio_url" in error.message
    error = await refusal(loader.fetch(MediaSource("image", PARAM, url=TEXT)))
    assert "data:<media type>;base64," in error.message
