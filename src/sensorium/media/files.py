"""`file:` URLs, off unless the operator named a folder. Regular files inside it are read; symlinks are not followed."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from sensorium.media.source import Refusal
from sensorium.units import size_text

FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(/[^?#]*)", re.IGNORECASE)
REFUSED = (
    "This file: URL cannot be read: only regular files inside the folder that the operator named with "
    "--allowed-local-media-path are. Send the {kind} as a data: URL instead."
)


class LocalFiles:
    """The folder that `file:` URLs may name; None refuses all of them, with the same words."""

    def __init__(self, root: Path | None) -> None:
        self._given = root.absolute() if root else None
        self._root = root.resolve(strict=True) if root else None

    def read(self, url: str, max_bytes: int) -> bytes:
        if self._root is None or self._given is None:
            raise Refusal("url", REFUSED)
        try:
            descriptor = self._open(self._root, self._inside(url))
        except (OSError, ValueError):
            raise Refusal("url", REFUSED) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Refusal("url", REFUSED)
        with os.fdopen(descriptor, "rb") as file:
            payload = file.read(max_bytes + 1)
        if len(payload) > max_bytes:
            raise Refusal("file_size", f"The {{kind}}'s file is larger than {size_text(max_bytes)}.")
        return payload

    def _inside(self, url: str) -> tuple[str, ...]:
        """The path below the folder, component by component; ValueError for anything outside or odd."""
        match = FILE_URL.fullmatch(url)
        path = unquote(match[1], errors="strict") if match else ""
        parts = Path(path).parts
        if not path or "\0" in path or ".." in parts:
            raise ValueError
        for root in (self._given, self._root):
            if root is not None and parts[: len(root.parts)] == root.parts and len(parts) > len(root.parts):
                return parts[len(root.parts) :]
        raise ValueError

    @staticmethod
    def _open(root: Path, parts: tuple[str, ...]) -> int:
        """Open component by component below the root's descriptor, so that no link can be swapped in between."""
        here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
        finally:
            os.close(here)
