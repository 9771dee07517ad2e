"""Media that stand in the request itself: `data:` URLs and base64 strings. Sizes are checked before decoding."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from sensorium.media.source import Refusal, size_text
from sensorium.types import Modality

MAX_HEAD = 256  # characters before the comma
DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
WHITESPACE = re.compile(rb"[ \t\r\n\f]+")
BAD_BASE64 = (
    "The {kind} is not valid base64: use the standard alphabet with padding, and write data:<media type>;base64,<data>."
)


@dataclass(frozen=True, slots=True)
class DataURL:
    """The two halves of a data: URL; `text` is still base64."""

    media_type: str  # lower case, may be empty
    text: str


def is_data_url(text: str) -> bool:
    """For fields that hold bare base64: no base64 has a colon."""
    return text[:5].lower() == "data:"


def split_data_url(url: str, kind: Modality) -> DataURL:
    """The declared type must be of the media item's kind (or say nothing); the bytes decide what it really is."""
    match = DATA_URL.match(url[:MAX_HEAD])
    if match is None:
        raise Refusal("url", "This is not a usable data: URL: write data:<media type>;base64,<data>.")
    media_type = match[1].strip().lower()
    if media_type not in ("", "application/octet-stream") and not media_type.startswith(_types_of(kind)):
        raise Refusal(
            "type", f"The data: URL does not declare its type as {{kind}}: write data:{kind}/<format>;base64,<data>."
        )
    if "base64" not in (parameter.strip().lower() for parameter in match[2].split(";")):
        raise Refusal("base64", BAD_BASE64)
    return DataURL(media_type, url[match.end() :])


def _types_of(kind: Modality) -> tuple[str, ...]:
    """Audio comes in video containers too: mp4 and webm are often declared as video, ogg as application."""
    return {
        "image": ("image/",),
        "video": ("video/", "application/mp4"),
        "audio": ("audio/", "video/mp4", "video/webm", "application/ogg"),
    }[kind]


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Standard base64 with padding. ASCII whitespace and percent-encoding are tolerated, nothing else is."""
    significant = len(text) - 2 * text.count("%") - sum(text.count(space) for space in " \t\r\n\f")
    if significant * 3 // 4 - 2 > max_bytes:
        raise Refusal("file_size", f"The {{kind}}'s file is larger than {size_text(max_bytes)}.")
    try:
        payload = _strict(text.encode("ascii"))
    except UnicodeEncodeError:
        raise Refusal("base64", BAD_BASE64) from None
    if len(payload) > max_bytes:
        raise Refusal("file_size", f"The {{kind}}'s file is larger than {size_text(max_bytes)}.")
    if not payload:
        raise Refusal("empty", "The {kind}'s data is empty.")
    return payload


def _strict(data: bytes) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        pass
    if b"%" in data:
        data = unquote_to_bytes(data)
    try:
        return base64.b64decode(WHITESPACE.sub(b"", data), validate=True)
    except binascii.Error:
        raise Refusal("base64", BAD_BASE64) from None
