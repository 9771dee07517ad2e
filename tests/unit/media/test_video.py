"""Videos: containers and codecs, sampling, rotation, limits and damage (safety catalogue S15, S17, S26, S73)."""

from __future__ import annotations

import base64
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clips import VALUES, replaced, video, with_matrix
from support.media_support import PARAM, load, refusal
from support.pictures import data_url, encoded, photo

from sensorium.config import Limits
from sensorium.errors import MediaError
from sensorium.media.header import read_header
from sensorium.media.loader import MediaLoader
from sensorium.media.sampling import PLACEMENTS, VideoSampling, fitted_size
from sensorium.media.source import MediaSize, MediaSource, RawMedia
from sensorium.types import MediaItem

ALL = VideoSampling(fps=None)


async def fetch(loader: MediaLoader, payload: bytes, media_type: str = "video/mp4") -> RawMedia:
    return await loader.fetch(MediaSource("video", PARAM, url=data_url(payload, media_type)))


async def take(loader: MediaLoader, payload: bytes, sampling: VideoSampling = ALL) -> MediaItem:
    """Decoded, and the size that was known before is the size that came."""
    raw = await fetch(loader, payload)
    size = loader.probe(raw, sampling=sampling)
    item = await loader.decode(raw, sampling=sampling)
    assert item.data.shape == (size.frames, size.height, size.width, 3)
    assert len(item.timestamps_s) == size.frames
    return item


def numbers(item: MediaItem) -> list[int]:
    """Which frames of `clips.video` these are, modulo 32."""
    means = item.data.mean(axis=(1, 2, 3))
    nearest = np.abs(means[:, None] - VALUES).argmin(axis=1)
    assert np.abs(means - VALUES[nearest]).max() < 3.5
    return [int(number) for number in nearest]


FILES = [
    ("libx264", "mp4"),
    ("libx264", "mov"),
    ("libx264", "matroska"),
    ("libx264", "avi"),
    ("hevc", "mp4"),
    ("mpeg4", "avi"),
    ("mpeg4", "mp4"),
    ("libvpx", "webm"),
    ("libvpx-vp9", "webm"),
    ("libsvtav1", "mp4"),
]
QUIET: dict[str, Any] = {"hevc": {"x265-params": "log-level=none"}}


def scheduling() -> int:
    """The class of this thread's scheduling, which processes started from here inherit."""
    return os.sched_getscheduler(0) if sys.platform == "linux" else 0


@pytest.mark.parametrize("codec, container", FILES)
async def test_every_frame_of_every_format(codec: str, container: str, loader: MediaLoader) -> None:
    before = scheduling()
    payload = video(codec, container, **QUIET.get(codec, {}))
    assert scheduling() == before
    raw = await fetch(loader, payload)
    assert loader.probe(raw, sampling=ALL) == MediaSize(48, 64, 30)
    assert raw.info is not None
    assert raw.info.duration_s == pytest.approx(3.0, abs=0.01)
    item = await loader.decode(raw, sampling=ALL)
    assert numbers(item) == list(range(30))
    assert item.timestamps_s == pytest.approx(np.arange(30) / 10, abs=0.002)
    assert item.kind == "video"
    assert not item.data.flags.writeable


@pytest.mark.parametrize(
    "codec, container, gop",
    [
        ("libx264", "mp4", 8),
        ("libx264", "mp4", 250),
        ("libx264", "matroska", 8),
        ("libx264", "avi", 8),
        ("libvpx-vp9", "webm", 8),
        ("hevc", "mp4", 8),
    ],
)
async def test_sampled_frames_are_the_very_frames(codec: str, container: str, gop: int, loader: MediaLoader) -> None:
    """Jumping from key frame to key frame gives what decoding everything gives, B frames and all."""
    payload = video(codec, container, frames=100, gop=gop, **QUIET.get(codec, {}))
    for sampling in (
        VideoSampling(num_frames=5),
        VideoSampling(fps=1.0),
        VideoSampling(num_frames=7, placement="centers"),
        VideoSampling(num_frames=40, placement="starts"),
        VideoSampling(fps=2.0, placement="stride"),
    ):
        item = await take(loader, payload, sampling)
        expected = sampling.indices(100, 10.0, 128)
        assert numbers(item) == [index % 32 for index in expected]
        assert item.timestamps_s == pytest.approx([index / 10 for index in expected], abs=0.002)


def test_sampling_rules() -> None:
    """Numbers worked out by hand from each family's own tools."""
    assert VideoSampling(num_frames=4).indices(31, 3.1, 128) == [0, 10, 20, 30]
    assert VideoSampling(num_frames=4, placement="starts").indices(40, 4, 128) == [0, 10, 20, 30]
    assert VideoSampling(num_frames=4, placement="centers").indices(40, 4, 128) == [5, 15, 25, 35]
    assert VideoSampling(fps=1, placement="stride", max_frames=64).indices(95, 9.5, 128) == list(range(0, 95, 10))
    assert VideoSampling(fps=1, placement="stride", max_frames=3).indices(100, 10, 128) == [10, 50, 80]
    qwen = VideoSampling(fps=2, min_frames=4, max_frames=768, even=True)
    assert len(qwen.indices(300, 10.0, 768)) == 20
    assert len(qwen.indices(300, 10.6, 768)) == 20  # 21.2 rounded down to even
    assert len(qwen.indices(5, 0.2, 768)) == 4
    assert qwen.indices(3, 0.1, 768) == [0, 2]
    assert qwen.indices(1, 0.04, 768) == [0]
    assert len(qwen.indices(30_000, 600.0, 128)) == 128
    assert VideoSampling(fps=None).indices(10, 1.0, 4) == [0, 3, 6, 9]


@given(
    st.builds(
        VideoSampling,
        fps=st.none() | st.floats(0.01, 100),
        num_frames=st.none() | st.integers(1, 1000),
        min_frames=st.integers(1, 64),
        max_frames=st.none() | st.integers(1, 1000),
        even=st.booleans(),
        placement=st.sampled_from(PLACEMENTS),
    ),
    st.integers(1, 20_000),
    st.floats(0.0, 600.0),
    st.integers(1, 768),
)
def test_sampling_is_always_within_bounds(sampling: VideoSampling, total: int, duration_s: float, limit: int) -> None:
    indices = sampling.indices(total, duration_s, limit)
    assert 1 <= len(indices) <= min(total, limit, sampling.max_frames or limit)
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < total
    if sampling.even and len(indices) > 1:
        assert len(indices) % 2 == 0
    assert VideoSampling(**sampling.as_record()) == sampling


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
async def test_rotation(turn: int, loader: MediaLoader) -> None:
    """S19's twin: a phone's video stands as it is shown."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255  # the upper left quarter
    payload = video(frames=4, turn=turn, draw=lambda number: picture)
    item = await take(loader, payload)
    expected = np.rot90(picture, turn // 90)  # ffmpeg's angle counts against the clock
    assert item.data.shape[1:] == expected.shape
    assert np.abs(item.data[0].astype(int) - expected).mean() < 8


def corner(height: int = 48, width: int = 64) -> np.ndarray:
    """White where the upper left quarter is, black elsewhere."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 255
    return picture


SHOWN: dict[tuple[float, float, float, float], Callable[[np.ndarray], np.ndarray]] = {
    (1, 0, 0, 1): lambda p: p,
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (-1, 0, 0, -1): lambda p: p[::-1, ::-1],
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (0, -1, 1, 0): np.rot90,
    (0, -1, -1, 0): lambda p: np.rot90(p.transpose(1, 0, 2), 2),
    (0, 0, 0, 0): lambda p: p,
    (0.9, 0.4, -0.4, 0.9): lambda p: p,
    (-0.9, 0.3, 0.3, 0.9): lambda p: p[:, ::-1],
}


async def test_all_orientations(loader: MediaLoader) -> None:
    """EXIF's eight, as a track's matrix says them (front cameras mirror), whatever size the frames are scaled to."""
    small = MediaLoader(Limits(max_video_pixels=3000), workers=1)
    for matrix, shown in SHOWN.items():
        payload = with_matrix(video(frames=2, draw=lambda number: corner()), matrix)
        for size, decoded in (((48, 64), await take(loader, payload)), ((33, 44), await take(small, payload))):
            expected = shown(corner(*size))
            assert decoded.data.shape[1:] == expected.shape, matrix
            assert np.abs(decoded.data[0].astype(int) - expected).mean() < 14, matrix
    await small.aclose()


async def test_sample_aspect_ratio_is_left_alone(loader: MediaLoader) -> None:
    """The stored pixels are what references show the model; so they are mirrored and not stretched."""
    plain = video(frames=2, draw=lambda number: corner())
    sides = struct.pack(">II", 128 << 16, 48 << 16)
    wide = replaced(plain, [b"moov", b"trak", b"tkhd"], lambda body: body[:-8] + sides)
    for payload in (wide, with_matrix(wide, (-1, 0, 0, 1))):
        assert (await take(loader, payload)).data.shape[1:] == (48, 64, 3)


async def test_odd_sizes_and_lengths(loader: MediaLoader) -> None:
    for frames in (1, 2, 3, 7):
        assert numbers(await take(loader, video(frames=frames))) == list(range(frames))
    item = await take(loader, video("libvpx-vp9", "webm", size=(37, 21), frames=3))
    assert item.data.shape == (3, 21, 37, 3)
    item = await take(loader, video(frames=1))
    assert item.timestamps_s == (0.0,)


async def test_keys_tell_samplings_apart(loader: MediaLoader) -> None:
    """S73."""
    still = video(draw=lambda number: np.full((48, 64, 3), 99, np.uint8), frames=20)
    keys = {(await take(loader, still, VideoSampling(fps=fps))).key for fps in (1.0, 2.0, 5.0)}
    keys.add((await take(loader, still, VideoSampling(num_frames=2, placement="centers"))).key)
    assert len(keys) == 4
    assert (await take(loader, still, VideoSampling(fps=2.0))).key in keys


async def test_large_clips_are_scaled_to_the_pixel_limit() -> None:
    loader = MediaLoader(Limits(max_video_pixels=20_000), workers=1)
    item = await take(loader, video(frames=20), VideoSampling(num_frames=4))
    assert item.data.shape == (4, 48, 64, 3)
    item = await take(loader, video(frames=20, turn=90))
    assert item.data.shape == (20, *fitted_size(64, 48, 20, 20_000), 3)
    assert item.data.shape[:3] == (20, 36, 27)
    assert numbers(item) == list(range(20))
    await loader.aclose()


async def test_limits() -> None:
    loader = MediaLoader(
        Limits(max_video_seconds=2.0, max_video_side=128, max_video_frames=6, max_video_bytes=100_000), workers=1
    )
    assert (await refusal(fetch(loader, video(frames=26)))).code == "video_too_long"
    assert (await refusal(fetch(loader, video(size=(130, 48), frames=2)))).code == "video_too_large"
    assert (await refusal(fetch(loader, video("mpeg4", "avi", size=(2, 48), frames=2)))).code == "video_too_small"
    assert (await refusal(fetch(loader, bytes(100_001)))).code == "video_file_too_large"
    assert len((await take(loader, video(frames=20))).data) == 6
    await loader.aclose()


async def test_damage(loader: MediaLoader) -> None:
    """S26 for videos: frames or a 400, never anything else; and the shape that was promised."""
    generator = random.Random(1)
    for codec, container in (("libx264", "mp4"), ("libvpx", "webm"), ("mpeg4", "avi")):
        payload = video(codec, container, frames=12)
        variants = [payload[: len(payload) * tenth // 10 or 1] for tenth in range(10)]
        for _ in range(25):
            damaged = bytearray(payload)
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            variants.append(bytes(damaged))
        decoded = 0
        for variant in variants:
            try:
                await take(loader, variant)
                decoded += 1
            except MediaError as error:
                assert error.code.startswith(("video_", "unsupported_video"))
        assert decoded > 10
    assert numbers(await take(loader, video())) == list(range(30))


def frame_list(*frames: bytes) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)


async def test_frame_lists(loader: MediaLoader) -> None:
    frames = [encoded(photo(40, 24).point(lambda value, n=n: (value + 9 * n) % 256), "JPEG") for n in range(5)]
    item = await load(loader, frame_list(*frames), "video")
    assert item.data.shape == (5, 24, 40, 3)
    assert item.timestamps_s == (0.0, 1.0, 2.0, 3.0, 4.0)
    for frame, payload in zip(item.data, frames, strict=True):
        np.testing.assert_array_equal(frame, (await load(loader, data_url(payload, "image/jpeg"))).data)
    assert read_header(frames[0]).upright == (24, 40)


@pytest.mark.parametrize(
    "url, code",
    [
        ("data:video/jpeg;base64," + "," * 10_000, "video_too_long"),
        ("data:video/jpeg;base64," + ",".join(["/9j/"] * 129), "video_too_long"),
        ("data:video/jpeg;base64,", "invalid_base64_video"),
        ("data:video/jpeg;base64,,", "invalid_base64_video"),
        ("data:video/jpeg;base64,%%%", "invalid_base64_video"),
        ("data:video/jpeg;base64,/9j/", "video_parse_error"),
        (frame_list(encoded(photo(16, 16))), "unsupported_video_media_type"),
        (frame_list(b"nonsense"), "unsupported_video_media_type"),
        (frame_list(encoded(photo(16, 16), "JPEG"), encoded(photo(8, 16), "JPEG")), "video_parse_error"),
        (frame_list(encoded(photo(16, 16), "JPEG"), encoded(photo(16, 16), "JPEG")[:300]), "video_parse_error"),
        (frame_list(encoded(photo(2, 16), "JPEG")), "video_too_small"),
    ],
    ids=range(11),
)
async def test_bad_frame_lists(url: str, code: str, loader: MediaLoader) -> None:
    """S15: counted before they are split."""
    start = time.process_time()
    assert (await refusal(load(loader, url, "video"))).code == code
    if code == "video_too_long":
        assert time.process_time() - start < 2


async def test_frame_list_bytes_count_together() -> None:
    frame = encoded(photo(64, 64), "JPEG")
    loader = MediaLoader(Limits(max_video_bytes=2 * len(frame), max_video_pixels=64 * 64), workers=1)
    assert (await refusal(load(loader, frame_list(frame, frame, frame), "video"))).code == "video_file_too_large"
    assert (await refusal(load(loader, frame_list(frame, frame), "video"))).code == "video_too_large"
    assert (await load(loader, frame_list(frame), "video")).data.shape == (1, 64, 64, 3)
    await loader.aclose()


async def test_videos_decode_side_by_side() -> None:
    """Two workers, more clips: all right, each its own."""
    import asyncio

    loader = MediaLoader(Limits(), workers=2)
    payloads = [video(frames=frames) for frames in range(3, 11)]
    items = await asyncio.gather(*(take(loader, payload) for payload in payloads))
    assert [len(item.data) for item in items] == list(range(3, 11))
    await loader.aclose()


@pytest.mark.parametrize("payload", [b"x", b"\xff\xff\xff\xffabc", b"\1\0\0\0a"])
async def test_no_name_that_a_client_gives_makes_a_frame_list(payload: bytes, loader: MediaLoader) -> None:
    data = base64.b64encode(payload).decode()
    source = MediaSource("audio", PARAM, data=data, format="video/jpeg")
    assert (await refusal(loader.fetch(source))).code == "unsupported_audio_media_type"
