"""What the examples share: the flags, the client, and media as URLs."""

from __future__ import annotations

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI


def arguments(description: str, *, path: str = "/v1") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base-url", default=f"http://127.0.0.1:8000{path}")
    parser.add_argument("--api-key", default="none", help="only needed where the server asks for one")
    parser.add_argument("--max-tokens", type=int, default=64)
    return parser


def connect(found: argparse.Namespace) -> tuple[OpenAI, str]:
    """A client, and the name of the first model that the server has."""
    client = OpenAI(base_url=found.base_url, api_key=found.api_key)
    return client, client.models.list().data[0].id


def media_url(place: str, kind: str) -> str:
    """URLs as they are; a file becomes a `data:` URL, so that the server needs no access to it. `kind` is for files
    whose name does not tell; servers go by what is in them anyway."""
    if "://" in place:
        return place
    kind = mimetypes.guess_type(place)[0] or kind
    return f"data:{kind};base64,{base64.b64encode(Path(place).read_bytes()).decode()}"


def image_url(place: str) -> str:
    return media_url(place, "image/jpeg")
