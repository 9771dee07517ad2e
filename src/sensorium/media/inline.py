"""Media that stand in the request itself: `data:` URLs and base64 strings. Sizes are checked before decoding."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from sensorium.media.source import Refusal
from sensorium.types import Modality
from sensorium.units import size_text

MAX_HEAD = 256  # characters before the comma
DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
WHITESPACE = re.compile(r"[ \t\r\n\f]+")
ESCAPED_SPACES = ("%20", "%09", "%0D", "%0d", "%0A", "%0a", "%0C", "%0c")
QUANTUM = 4  # characters, for three bytes
PIECE_CHARS = 256 * 1024
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
    significant = len(text) - 2 * text.count("%") - sum(map(text.count, " \t\r\n\f"))
    if "%" in text:
        significant -= sum(map(text.count, ESCAPED_SPACES))
    if significant * 3 // 4 - 2 > max_bytes:
        raise Refusal("file_size", f"The {{kind}}'s file is larger than {size_text(max_bytes)}.")
    payload = b"".join(_decoded(text))
    if len(payload) > max_bytes:
        raise Refusal("file_size", f"The {{kind}}'s file is larger than {size_text(max_bytes)}.")
    if not payload:
        raise Refusal("empty", "The {kind}'s data is empty.")
    return payload


def _decoded(text: str) -> Iterator[bytes]:
    """In pieces, between which other threads run: one conversion holds the interpreter until it is done."""
    rest, is_over = "", False
    for piece in _pieces(text):
        given = rest + piece
        data = _strict(given)
        if data is None or is_over:
            given = _cleaned(given)
            data = None if "%" in given else _strict(given)
        if data is None or (is_over and given):
            raise Refusal("base64", BAD_BASE64)
        yield data
        whole = len(given) - len(given) % QUANTUM
        is_over, rest = is_over or len(data) * QUANTUM < whole * 3, given[whole:]
    if _cleaned(rest):
        raise Refusal("base64", BAD_BASE64)


def _pieces(text: str) -> Iterator[str]:
    """None of them ends in a percent escape."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            end -= next((back for back in (1, 2) if text[end - back] == "%"), 0)
        yield text[start:end]
        start = end


def _cleaned(text: str) -> str:
    return WHITESPACE.sub("", unquote(text, "latin-1") if "%" in text else text)


def _strict(text: str) -> bytes | None:
    """What the whole quanta at its beginning mean; None if there is anything else among them."""
    try:
        return binascii.a2b_base64(text[: len(text) - len(text) % QUANTUM], strict_mode=True)
    except ValueError:
        return None
