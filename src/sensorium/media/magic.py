"""Which container a video or audio file is in, by its first bytes. ffmpeg is told, and never guesses.

So nothing that names other files (playlists, ffconcat, SDP, DASH, image sequences) is ever parsed.
"""

from __future__ import annotations

from typing import Literal

from sensorium.media.source import Refusal
from sensorium.types import Modality

Demuxer = Literal["mov", "matroska", "avi", "wav", "flac", "ogg", "mp3", "aac", "aiff"]

WANTED: dict[Modality, tuple[frozenset[Demuxer], str]] = {
    "video": (frozenset(("mov", "matroska", "avi")), "MP4, MOV, WebM, MKV or AVI"),
    "audio": (
        frozenset(("wav", "flac", "ogg", "mp3", "aac", "aiff", "mov", "matroska")),
        "WAV, MP3, FLAC, Ogg, M4A or WebM",
    ),
}
ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free")


def container_of(kind: Modality, payload: bytes) -> Demuxer:
    """Refusal("type") for everything else."""
    demuxers, names = WANTED[kind]
    found = _sniff(payload)
    if found not in demuxers:
        raise Refusal("type", f"This file is not in a supported {{kind}} format: send {names}.")
    return found


def _sniff(payload: bytes) -> Demuxer | None:
    if payload[:4] == b"RIFF":
        return {b"AVI ": "avi", b"WAVE": "wav"}.get(payload[8:12])  # type: ignore[return-value]
    if payload[:4] == b"RF64":  # a WAV whose sizes have 64 bits
        return "wav" if payload[8:12] == b"WAVE" else None
    if payload[:4] == b"FORM":
        return "aiff" if payload[8:12] in (b"AIFF", b"AIFC") else None
    for magic, demuxer in ((b"\x1aE\xdf\xa3", "matroska"), (b"fLaC", "flac"), (b"OggS", "ogg")):
        if payload.startswith(magic):
            return demuxer  # type: ignore[return-value]
    if payload[4:8] in ATOMS:
        return "mov"
    if payload[:3] == b"ID3" and len(payload) > 10:
        return _behind_tag(payload)
    return _mpeg_audio(payload)


def _behind_tag(payload: bytes) -> Demuxer | None:
    """An ID3 tag stands before MP3, now and then before FLAC or AAC; its length has 7 bits to the byte."""
    length = 0
    for byte in payload[6:10]:
        length = length << 7 | byte & 0x7F
    rest = payload[10 + length : 10 + length + 4]
    return "flac" if rest == b"fLaC" else _mpeg_audio(rest) or "mp3"


def _mpeg_audio(payload: bytes) -> Demuxer | None:
    """A frame's sync word: layer 0 is AAC in ADTS frames, the others are MPEG audio."""
    if len(payload) < 3 or payload[0] != 0xFF or payload[1] & 0xE0 != 0xE0:
        return None
    if payload[1] & 0x06 == 0:
        return "aac" if payload[1] & 0xF0 == 0xF0 else None
    return "mp3" if payload[2] & 0xF0 != 0xF0 else None
