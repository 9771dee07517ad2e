"""Large files of a hub repository, put into the hub's cache so that a program that was stopped goes on where it was.

The hub's own library goes on after a broken connection, but begins a file anew in the next process.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from sensorium.units import MiB

LARGE_BYTES = 16 * MiB
PART = "part"  # what a file that is not whole ends in
THREADS = 4  # files at a time
SHA256_DIGITS = 64


def fetch_large(model: str, blobs: Path, files: Iterable[Any]) -> None:
    """`files` are what a dry run of the hub's library lists. Those that it would fetch and that are large lie in
    `blobs` afterwards, where it looks for them. The library's errors are raised as they are."""
    wanted = [one for one in files if one.will_download and (one.file_size or 0) >= LARGE_BYTES]
    if not wanted:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(THREADS, "hub") as threads:
        for _ in threads.map(lambda one: _fetch(model, blobs, one.filename, one.commit_hash), wanted):
            pass


def begun_bytes(blobs: Path) -> int:
    return sum(file.stat().st_size for file in blobs.glob(f"*.{PART}"))


def _fetch(model: str, blobs: Path, name: str, commit: str) -> None:
    from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    url = hf_hub_url(model, name, revision=commit)
    found = get_hf_file_metadata(url)
    if found.etag is None or found.size is None or (blobs / found.etag).exists():
        return
    headers = build_hf_headers()
    if urlparse(url).netloc != urlparse(found.location).netloc:
        headers.pop("authorization", None)  # a key of the hub is none of another host's business
    part = blobs / f"{found.etag}.{PART}"
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another process is at it: the library fetches this one's own
        _go_on(file, part, found.location, headers, found.size)
        if _is_right(part, found.etag):
            part.replace(blobs / found.etag)
        else:
            part.unlink()


def _go_on(file: BinaryIO, part: Path, url: str, headers: dict[str, str], size: int) -> None:
    from huggingface_hub.file_download import http_get

    begun = part.stat().st_size
    if begun > size:
        file.truncate(0)
        begun = 0
    http_get(url, file, resume_size=begun, headers=headers, expected_size=size, displayed_filename=part.stem)
    file.flush()


def _is_right(part: Path, etag: str) -> bool:
    """Whether it is what its name says, where that is the SHA-256 of its content."""
    if len(etag) != SHA256_DIGITS:
        return True
    with part.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == etag
