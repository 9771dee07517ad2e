"""The web page at `/`: a literal list of files, read once at start, served from a dict by exact path and to everybody.

No folder is ever looked into for a request, so there is nothing to walk out of. The page asks before it uses a file
that it has kept (ETag), and its policy lets it load nothing that does not come from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.api.transport.asgi import Call, Header
from sensorium.errors import StartupError

if TYPE_CHECKING:
    from sensorium.api.context import Context

_FOLDER = Path(__file__).parents[1] / "playground"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_MODULES = (
    "answer",
    "api",
    "attachments",
    "calls",
    "capture",
    "chat",
    "compare",
    "conversation",
    "dialogs",
    "dom",
    "fields",
    "i18n",
    "main",
    "metrics",
    "models",
    "plot",
    "reasoning",
    "render",
    "samples",
    "server",
    "settings",
    "snippets",
    "sse",
    "store",
    "theme",
    "turn",
    "wav",
    "words",
)
PAGES: Mapping[str, str] = {
    "/": "index.html",
    **{f"/playground/{name}": name for name in ("style.css", "icon.svg", *(f"{module}.js" for module in _MODULES))},
}
"""Path -> file. What is not here is not served, whatever lies in the folder."""

_POLICY = b"; ".join(
    (
        b"default-src 'none'",
        b"script-src 'self'",
        b"style-src 'self'",
        b"img-src 'self' blob: data:",
        b"media-src blob: data:",
        b"connect-src 'self'",
        b"base-uri 'none'",
        b"form-action 'none'",
        b"frame-ancestors 'none'",
    )
)


@dataclass(frozen=True, slots=True)
class PageFile:
    body: bytes
    content_type: bytes
    etag: bytes


def read_pages(folder: Path = _FOLDER) -> dict[str, PageFile]:
    """Every path's file."""
    try:
        return {path: _read(folder / name) for path, name in PAGES.items()}
    except OSError as error:
        raise StartupError(f"The web page's files are incomplete: {error.strerror}.") from None


def _read(file: Path) -> PageFile:
    body = file.read_bytes()
    return PageFile(body, _TYPES[file.suffix], b'"' + hashlib.sha256(body).hexdigest()[:32].encode() + b'"')


_BY_ACCEPT: Header = (b"vary", b"accept")
_HTML = frozenset({b"text/html", b"application/xhtml+xml", b"text/*", b"*/*"})


def _takes_html(call: Call) -> bool:
    accepted = b",".join(call.headers(b"accept")).lower()
    return not accepted or any(one.partition(b";")[0].strip() in _HTML for one in accepted.split(b","))


async def page(context: Context, call: Call) -> None:
    """One file, whole: ranges are not offered and a request for one gets everything. Who does not take HTML looks for
    Ollama at the root."""
    if call.path == "/" and not _takes_html(call):
        await call.respond(b"Ollama is running", content_type=b"text/plain; charset=utf-8", headers=[_BY_ACCEPT])
        return
    found = context.pages[call.path]
    headers: list[Header] = [
        *([_BY_ACCEPT] if call.path == "/" else ()),
        (b"etag", found.etag),
        (b"content-security-policy", _POLICY),
        (b"referrer-policy", b"no-referrer"),
    ]
    known = found.etag in (call.header(b"if-none-match") or b"").replace(b"W/", b"").split(b", ")
    await call.respond(
        b"" if known else found.body,
        status=304 if known else 200,
        content_type=found.content_type,
        cache=b"no-cache",
        headers=headers,
    )
