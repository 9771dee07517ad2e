"""What goes into and comes out of the media layer, and the one form in which it refuses something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sensorium.errors import MediaError
from sensorium.types import Modality

PADDING_S = 0.5  # beyond a limit on seconds: what encoders put before and behind (8 kHz MP3 and AAC: up to 0.4 s)

CRASHED = "The {kind} could not be decoded: its file is damaged or takes more time or memory than it may."

Problem = Literal["url", "base64", "download", "file_size", "empty", "type", "large", "small", "long", "parse"]

CODES: dict[Problem, str] = {
    "url": "invalid_{kind}_url",
    "base64": "invalid_base64_{kind}",
    "download": "failed_to_download_{kind}",
    "file_size": "{kind}_file_too_large",
    "empty": "empty_{kind}_file",
    "type": "unsupported_{kind}_media_type",
    "large": "{kind}_too_large",
    "small": "{kind}_too_small",
    "long": "{kind}_too_long",
    "parse": "{kind}_parse_error",
}


@dataclass(frozen=True, slots=True)
class MediaSource:
    """One media item of a request: a URL (http, https, data or file), base64 `data` (`input_audio`), or the file
    itself as it was uploaded."""

    kind: Modality
    param: str  # where it stands in the request: messages[0].content[1].image_url.url
    url: str | None = None
    data: str | None = None
    format: str | None = None  # what the client says `data` is; bytes decide
    payload: bytes | None = None
    uuid: str | None = None  # the client's name for it; alone, it stands for what was sent under that name before

    @property
    def is_named_only(self) -> bool:
        return self.url is None and self.data is None and self.payload is None


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What a worker counted in the packets of a video or audio file, not what a header claims. Sizes are upright."""

    container: str  # ffmpeg's demuxer, or "frames" for a list of images
    duration_s: float
    frames: int = 0
    height: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True)
class RawMedia:
    """A media item's file as it came, at most as many bytes as its kind may have; `info` for videos and audio."""

    kind: Modality
    param: str
    payload: bytes
    declared_type: str | None = None
    info: StreamInfo | None = None


@dataclass(frozen=True, slots=True)
class MediaSize:
    """What will come out of decoding: upright pixels; `frames` of a video as sampled, of audio its samples."""

    height: int
    width: int
    frames: int = 1


class Refusal(Exception):
    """Internal to this package: why a media item is not taken. `{kind}` in the text becomes image, video or audio."""

    def __init__(self, problem: Problem, text: str) -> None:
        super().__init__(text)
        self.problem: Problem = problem
        self.text = text

    def as_error(self, kind: Modality, param: str) -> MediaError:
        """The client's view. The text is ours alone: nothing of a library's message or of the file is in it."""
        text = self.text.replace("{kind}", kind)
        return MediaError(text, param=param, code=CODES[self.problem].format(kind=kind))
