"""Opening a video or audio file with ffmpeg, as little of it as possible. Runs in decode workers only.

Bytes in, one stream out: the demuxer is forced, codecs are on a list, and what else a container names (another file, a
URL) is behind three locks: the protocol list is empty, nested opens raise, and the process can open nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NoReturn

import av
import av.error
import av.subtitles.codeccontext  # PyAV imports these late, which a worker that is locked in no longer can
import av.subtitles.stream
import av.subtitles.subtitle
from av.container import InputContainer

from sensorium.media.magic import Demuxer
from sensorium.media.source import Refusal
from sensorium.types import Modality

VIDEO_CODECS = {
    "h264": "h264",
    "hevc": "hevc",
    "vp8": "vp8",
    "vp9": "vp9",
    "av1": "libdav1d",
    "mpeg4": "mpeg4",
    "mjpeg": "mjpeg",
}
AUDIO_CODECS = {
    "mp3": "mp3float",
    "aac": "aac",
    "flac": "flac",
    "opus": "opus",
    "vorbis": "vorbis",
    "alac": "alac",
    **{
        name: name
        for name in (
            "pcm_s16le",
            "pcm_s16be",
            "pcm_s24le",
            "pcm_s24be",
            "pcm_s32le",
            "pcm_s32be",
            "pcm_u8",
            "pcm_s8",
            "pcm_f32le",
            "pcm_f32be",
            "pcm_f64le",
            "pcm_f64be",
            "pcm_mulaw",
            "pcm_alaw",
            "adpcm_ms",
            "adpcm_ima_wav",
        )
    },
}
"""Codec -> the one decoder that may be used for it. JPEG 2000 and everything rarer is not there."""

DEMUXER_NAMES: dict[Demuxer, str] = {"mov": "mov,mp4,m4a,3gp,3g2,mj2", "matroska": "matroska,webm"}
DAMAGED = "The {kind}'s file is damaged or cut off: it cannot be decoded."
UNREADABLE = (av.error.FFmpegError, OSError, ValueError, EOFError, LookupError, ArithmeticError, MemoryError)
"""What PyAV raises for damaged files."""


def damaged() -> Refusal:
    return Refusal("parse", DAMAGED)


@contextmanager
def opened(payload: bytes, kind: Modality, demuxer: Demuxer) -> Iterator[tuple[InputContainer, Any]]:
    """(container, its first stream of this kind). Errors of ffmpeg inside the block become a refusal."""
    codecs = VIDEO_CODECS if kind == "video" else AUDIO_CODECS
    options = {
        "protocol_whitelist": "",
        "format_whitelist": DEMUXER_NAMES.get(demuxer, demuxer),
        "codec_whitelist": ",".join(codecs.values()),
    }
    if demuxer == "mov":
        options |= {"enable_drefs": "0", "use_absolute_path": "0"}
    try:
        with av.open(
            BytesIO(payload),
            "r",
            format=demuxer,
            container_options=options,
            io_open=_open_nothing,
            metadata_errors="replace",
        ) as container:
            yield container, _stream(container, kind, codecs)
    except UNREADABLE:
        raise damaged() from None


def _open_nothing(_url: str, _flags: int, _options: dict[str, str]) -> NoReturn:
    raise PermissionError


def _stream(container: InputContainer, kind: Modality, codecs: dict[str, str]) -> Any:
    streams = [
        stream
        for stream in (container.streams.video if kind == "video" else container.streams.audio)
        if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        raise Refusal("type", "The file holds no {kind}.")
    stream = streams[0]
    codec = stream.codec_context.codec.canonical_name if stream.codec_context is not None else ""
    if codec not in codecs:
        raise Refusal("type", f"The {{kind}}'s codec is not one of those served here: {', '.join(_names(kind))}.")
    if stream.codec_context.codec.name != codecs[codec]:
        raise Refusal("type", "The {kind}'s codec cannot be decoded by this server's ffmpeg.")
    stream.codec_context.thread_count = threads_of_decoder()
    return stream


def threads_of_decoder() -> int:
    """Some of the cores: requests decode side by side."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def _names(kind: Modality) -> tuple[str, ...]:
    if kind == "video":
        return "H.264", "HEVC", "VP8", "VP9", "AV1", "MPEG-4", "MJPEG"
    return "PCM", "MP3", "AAC", "FLAC", "Opus", "Vorbis", "ALAC"
