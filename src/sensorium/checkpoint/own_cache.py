"""Folders for what is made of a checkpoint's files once and read again at later starts."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from pathlib import Path

_log = logging.getLogger("sensorium")


def own_cache(kind: str) -> Path | None:
    """The user's folder for this kind; None without a home."""
    try:
        return Path.home() / ".cache" / "sensorium" / kind
    except RuntimeError:  # neither HOME nor an entry in passwd
        return None


def writable(cache: Path | None, what: str) -> Path:
    """This folder, made if need be, or a temporary one for as long as this process lives."""
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
            return cache
    except OSError:
        pass
    _log.warning(
        "%s is not kept: %s", what, "there is no home folder" if cache is None else f"{cache} cannot be written to"
    )
    scratch = Path(tempfile.mkdtemp(prefix="sensorium-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch
