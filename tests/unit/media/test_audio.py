"""Sounds: formats, rates, the downmix, limits and damage (safety catalogue S17, S20, S26)."""

from __future__ import annotations

import random
import resource
import struct
from typing import Any

import numpy as np
import pytest
import soxr
from support.clips import sound, tone, video, wav
from support.media_support import PARAM, load, refusal
from support.pictures import data_url

from sensorium.config import Limits
from sensorium.errors import MediaError
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource
from sensorium.types import MediaItem


async def hear(loader: MediaLoader, payload: bytes, rate: int = 16000, media_type: str = "audio/x-any") -> MediaItem:
    raw = await loader.fetch(MediaSource("audio", PARAM, url=data_url(payload, media_type)))
    size = loader.probe(raw, sample_rate=rate)
    item = await loader.decode(raw, sample_rate=rate)
    assert item.data.dtype == np.float32
    assert item.sample_rate == rate
    assert (size.height, size.width) == (1, 1)
    assert abs(size.frames - len(item.data)) <= max(0.13 * rate, 2)  # codecs add silence at the ends
    return item


def pitch(item: MediaItem) -> float:
    spectrum = np.abs(np.fft.rfft(item.data * np.hanning(len(item.data))))
    return float(spectrum.argmax() * item.sample_rate / len(item.data))


FILES = [
    ("pcm_s16le", "wav", "s16", 44100),
    ("pcm_s24le", "wav", "s32", 48000),
    ("pcm_f32le", "wav", "flt", 16000),
    ("pcm_u8", "wav", "u8", 8000),
    ("pcm_mulaw", "wav", "s16", 8000),
    ("pcm_s16be", "aiff", "s16", 22050),
    ("libmp3lame", "mp3", "fltp", 44100),
    ("flac", "flac", "s16", 44100),
    ("flac", "ogg", "s16", 48000),
    ("libopus", "ogg", "flt", 48000),
    ("libopus", "webm", "flt", 48000),
    ("vorbis", "ogg", "fltp", 44100),
    ("aac", "mp4", "fltp", 44100),
    ("aac", "ipod", "fltp", 48000),
    ("alac", "mp4", "s16p", 44100),
    ("aac", "adts", "fltp", 32000),
    ("libopus", "matroska", "flt", 48000),
    ("pcm_s16le", "mov", "s16", 16000),
]


@pytest.mark.parametrize("codec, container, sample_format, rate", FILES)
async def test_formats(codec: str, container: str, sample_format: str, rate: int, loader: MediaLoader) -> None:
    """Declared or not: the bytes decide. Same length, pitch and loudness."""
    samples = tone(1.5, rate)
    if codec == "vorbis":
        samples = np.stack([samples, samples])  # ffmpeg's own encoder knows only stereo
    options = {"strict": "experimental"} if codec == "vorbis" else {}
    item = await hear(loader, sound(samples, rate, codec, container, sample_format, **options))
    assert len(item.data) == pytest.approx(24000, abs=2100)
    assert pitch(item) == pytest.approx(440, abs=1)
    assert np.sqrt(np.mean(item.data[4000:20000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize(
    "codec, sample_format, step",
    [("pcm_s16le", "s16", 2**-15), ("pcm_f32le", "flt", 0), ("pcm_u8", "u8", 2**-7), ("pcm_s32le", "s32", 2**-24)],
)
async def test_samples_are_exact_without_resampling(
    codec: str, sample_format: str, step: float, loader: MediaLoader
) -> None:
    samples = tone(0.3, 16000)
    item = await hear(loader, sound(samples, 16000, codec, "wav", sample_format))
    np.testing.assert_allclose(item.data, samples, atol=step)


async def test_wav_with_sizes_of_64_bits(loader: MediaLoader) -> None:
    """RF64, as broadcasters' recorders write it."""
    samples = tone(0.3, 16000)
    item = await hear(loader, sound(samples, 16000, "pcm_s16le", "wav", "s16", rf64="always"))
    np.testing.assert_allclose(item.data, samples, atol=2**-15)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
async def test_resampling_is_soxr(rate: int, loader: MediaLoader) -> None:
    samples = tone(0.7, rate) + np.float32(0.2) * tone(0.7, rate, 3000)
    item = await hear(loader, sound(samples, rate, "pcm_f32le", "wav", "flt"))
    expected = soxr.resample(samples, rate, 16000)
    assert len(item.data) == len(expected)
    np.testing.assert_allclose(item.data, expected, atol=2e-6)


async def test_downmix(loader: MediaLoader) -> None:
    """S20: stereo is the mean of both sides, nothing else; what cancels for the arithmetic is silence for the model."""
    left, right = tone(0.5, 16000), tone(0.5, 16000, 880)
    item = await hear(loader, sound(np.stack([left, right]), 16000, "pcm_f32le", "wav", "flt"))
    np.testing.assert_allclose(item.data, (left + right) / 2, atol=1e-7)
    item = await hear(loader, sound(np.stack([left, -left]), 16000, "pcm_f32le", "wav", "flt"))
    assert not item.data.any()


HUGE = b"".join(struct.pack("<f", value) for value in (0.0, 1e30, 0.0, 0.0))
BAD = {
    "six channels": (sound(np.stack([tone(0.2, 16000)] * 6), 16000), "unsupported_audio_media_type"),
    "1 Hz": (wav(bytes(64), rate=1), "unsupported_audio_media_type"),
    "4 GHz": (wav(bytes(64), rate=4_000_000_000), None),
    "7999 Hz": (wav(bytes(64), rate=7999), "unsupported_audio_media_type"),
    "no channels": (wav(bytes(64), channels=0), None),
    "65535 channels": (wav(bytes(64), channels=65535, bits=8), None),
    "claims 4 GiB": (wav(b"", claimed=0xFFFFFFF0), None),
    "empty": (wav(b""), "empty_audio_file"),
    "no data chunk": (wav(b"")[:36], None),
    "nan": (wav(struct.pack("<4f", 0, float("nan"), 0, 0), bits=32, tag=3), "audio_parse_error"),
    "infinite": (wav(struct.pack("<4f", 0, float("inf"), 0, 0), bits=32, tag=3), "audio_parse_error"),
    "enormous": (wav(HUGE, bits=32, tag=3), "audio_parse_error"),
    "unknown tag": (wav(bytes(64), tag=0x1234), "unsupported_audio_media_type"),
    "video only": (video(), "unsupported_audio_media_type"),
    "text": (b"hello", "unsupported_audio_media_type"),
    "picture": (b"\xff\xd8\xff\xe0" + bytes(60), "unsupported_audio_media_type"),
    "midi": (b"MThd\0\0\0\6\0\1\0\1\0\x60" + bytes(60), "unsupported_audio_media_type"),
}


@pytest.mark.parametrize("name", BAD)
async def test_refused_sounds(name: str, loader: MediaLoader) -> None:
    """S20, S21."""
    payload, code = BAD[name]
    error = await refusal(load(loader, data_url(payload, "audio/wav"), "audio"))
    assert error.code == code or (
        code is None
        and error.code in ("unsupported_audio_media_type", "audio_parse_error", "empty_audio_file", "audio_too_long")
    )


async def test_short_sounds(loader: MediaLoader) -> None:
    assert (await hear(loader, wav(b"\0\x40"))).data.tolist() == [0.5]
    assert len((await hear(loader, sound(tone(0.1, 16000), 16000))).data) == 1600


async def test_a_long_opus_file_is_stopped_at_the_limit() -> None:
    """S17: a few hundred bytes a second on the wire, gigabytes as floats."""
    silence = sound(np.zeros(48000 * 20, np.float32), 48000, "libopus", "ogg", "flt")
    loader = MediaLoader(Limits(max_audio_seconds=10.0), workers=1)
    error = await refusal(load(loader, data_url(silence, "audio/ogg"), "audio"))
    assert error.code == "audio_too_long"
    await loader.aclose()


async def test_many_hours_of_silence() -> None:
    """S17 at its size: 8.7 hours, counted without decoding."""
    packet_s, hours = 0.06, 8.7
    short = sound(np.zeros(48000 * 60, np.float32), 48000, "libopus", "webm", "flt", frame_duration="60")
    long = stretched(short, round(hours * 3600 / packet_s))
    loader = MediaLoader(Limits(), workers=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = await refusal(load(loader, data_url(long, "audio/webm"), "audio"))
    assert error.code == "audio_too_long"  # decoding it takes more processor time than a worker has
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 * 1024
    await loader.aclose()


def stretched(webm: bytes, packets: int) -> bytes:
    """The same Opus stream with one silent packet repeated so often."""
    import io

    import av

    with av.open(io.BytesIO(webm), "r") as source:
        stream = source.streams.audio[0]
        packet = [bytes(packet) for packet in source.demux(stream) if packet.size][5]
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="matroska") as output:
            out = output.add_stream_from_template(stream)
            for number in range(packets):
                copy: Any = av.Packet(packet)
                copy.stream, copy.time_base = out, stream.time_base
                copy.pts = copy.dts = number * 60
                copy.duration = 60
                output.mux(copy)
    return buffer.getvalue()


async def test_a_header_that_claims_less_does_not_help() -> None:
    """The limit counts decoded samples, not what the packets said."""
    loader = MediaLoader(Limits(max_audio_seconds=1.0), workers=1)
    raw = await loader.fetch(MediaSource("audio", PARAM, url=data_url(sound(tone(0.5, 16000), 16000), "audio/wav")))
    long = sound(tone(1.6, 16000), 16000)
    import dataclasses

    error = await refusal(loader.decode(dataclasses.replace(raw, payload=long)))
    assert error.code == "audio_too_long"
    await loader.aclose()


async def test_damage(loader: MediaLoader) -> None:
    generator = random.Random(2)
    for codec, container, sample_format in (
        ("libmp3lame", "mp3", "fltp"),
        ("libopus", "webm", "flt"),
        ("aac", "mp4", "fltp"),
        ("flac", "flac", "s16"),
        ("pcm_s16le", "wav", "s16"),
    ):
        payload = sound(tone(0.5, 48000), 48000, codec, container, sample_format)
        variants = [payload[: len(payload) * tenth // 10 or 1] for tenth in range(10)]
        for _ in range(25):
            damaged = bytearray(payload)
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            variants.append(bytes(damaged))
        decoded = 0
        for variant in variants:
            try:
                item = await load(loader, data_url(variant, "audio/any"), "audio")
                assert np.isfinite(item.data).all()
                decoded += 1
            except MediaError as error:
                assert error.code.startswith(("audio_", "unsupported_audio", "empty_audio"))
        assert decoded > 5


async def test_sound_of_a_video_file_is_heard(loader: MediaLoader) -> None:
    """Its picture track is not touched."""
    payload = sound(tone(1.0, 48000), 48000, "aac", "mp4", "fltp")
    assert pitch(await hear(loader, payload, media_type="video/mp4")) == pytest.approx(440, abs=1)


async def test_rate_is_in_the_key(loader: MediaLoader) -> None:
    silence = wav(bytes(3200))
    assert (await hear(loader, silence, 16000)).key != (await hear(loader, silence, 8000)).key
    assert (await hear(loader, silence, 16000)).key == (await hear(loader, silence, 16000)).key


@pytest.mark.parametrize(
    "codec, container, sample_format, rate",
    [
        ("libmp3lame", "mp3", "fltp", 8000),
        ("libmp3lame", "mp3", "fltp", 44100),
        ("aac", "adts", "fltp", 8000),
        ("aac", "mp4", "fltp", 16000),
        ("libopus", "ogg", "flt", 48000),
        ("pcm_s16le", "wav", "s16", 16000),
    ],
)
async def test_exactly_as_long_as_may_be(codec: str, container: str, sample_format: str, rate: int) -> None:
    """What an encoder puts before and behind does not count; a second more does."""
    loader = MediaLoader(Limits(max_audio_seconds=3.0), workers=1)
    payload = sound(tone(3.0, rate), rate, codec, container, sample_format)
    item = await load(loader, data_url(payload, "audio/x-any"), "audio")
    assert len(item.data) == pytest.approx(48_000, abs=8000)
    longer = sound(tone(4.0, rate), rate, codec, container, sample_format)
    error = await refusal(load(loader, data_url(longer, "audio/x-any"), "audio"))
    assert error.code == "audio_too_long" and "3 s" in error.message
    await loader.aclose()
