"""Where a model folder is: a local path, or the snapshot of a hub repository."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.checkpoint.gguf import SUFFIX, gguf_folder, gguf_in
from sensorium.checkpoint.hub_files import begun_bytes, fetch_large
from sensorium.checkpoint.values import read_json
from sensorium.errors import StartupError
from sensorium.units import MiB, size_text

Fetching = Callable[[float], None]
"""Told the part of what is fetched that has come, 0 to 1."""
SPARE_BYTES = 256 * MiB  # of the disk, which others write to as well
WATCH_S = 0.5

_HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "*.safetensors")

_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")

_HUB_IGNORED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*.onnx", "coreml/*")

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def resolve(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    *,
    fetch: bool = True,
    on_progress: Fetching | None = None,
    mmproj: str | None = None,
) -> Path:
    """A local folder as it is, a GGUF file (and its tower `mmproj`) as the folder that is made of it, else the hub
    repository's snapshot: every file of one commit. One that is whole on this machine is taken without asking the hub;
    without `fetch` the hub is never asked."""
    folder = Path(model)
    if model.startswith("~/"):
        folder = Path(os.path.expanduser(model))  # noqa: PTH111 - Path's raises without a home
    is_file = folder.suffix == SUFFIX or (bool(model) and folder.is_file())  # Ollama's have no suffix
    found = gguf_in(folder) if model and folder.is_dir() else folder if is_file else None
    if found is not None:
        if not found.is_file():
            raise StartupError(f"no such file: {model}")
        return gguf_folder(found, mmproj=None if mmproj is None else Path(mmproj))
    if mmproj is not None:
        raise StartupError(f"--mmproj goes with a GGUF file, and {model} is none")
    if model and folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(model):
        raise StartupError(f"no such folder: {model}")
    repository = Repository(model, revision, download_dir)
    if (snapshot := repository.on_disk()) is not None:
        return snapshot
    if not fetch:
        raise StartupError(f"{repository}: not a local folder, and not downloaded yet")
    return repository.fetched(on_progress)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub, and the folder that keeps what is fetched of it (None: the hub's cache)."""

    model: str
    revision: str | None = None
    download_dir: str | None = None

    def __str__(self) -> str:
        return f"{self.model} (revision {self.revision})" if self.revision else self.model

    def on_disk(self) -> Path | None:
        """The snapshot, if all of its files are on this machine."""
        from huggingface_hub import errors

        try:
            snapshot = self._snapshot(*_HUB_PATTERNS, local_files_only=True)
            if not any(snapshot.glob("*.safetensors")):
                snapshot = self._snapshot(*_PICKLES, commit=snapshot.name, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            return None
        except (errors.HFValidationError, OSError):
            return None  # fetching it will say what is wrong
        return snapshot if _has_weights(snapshot) else None

    def fetched(self, on_progress: Fetching | None = None) -> Path:
        """The snapshot of the newest commit, with what is missing of it fetched: what was begun is gone on with.
        StartupError if it cannot be had, or if there is no room for it."""
        from huggingface_hub import errors

        # A connection that breaks is an error of the hub's own HTTP client, whichever that is.
        broken: Any = errors.HfHubHTTPError.__bases__
        try:
            with nullcontext() if on_progress is None else _without_bars():
                snapshot = self._fetch(_HUB_PATTERNS, on_progress)
                if not any(snapshot.glob("*.safetensors")):
                    # The folder is named after the commit: the second call cannot get files of another one.
                    snapshot = self._fetch(_PICKLES, on_progress, commit=snapshot.name)
                return snapshot
        except errors.GatedRepoError as error:
            raise StartupError(f"{self}: the hub must grant you access to it first (then `hf auth login`)") from error
        except errors.RevisionNotFoundError as error:
            raise StartupError(f"{self}: the repository has no such revision") from error
        except errors.RepositoryNotFoundError as error:
            raise StartupError(f"{self}: neither a local folder nor a repository that the hub shows you") from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise StartupError(
                f"{self}: not a local folder, not downloaded yet, and the hub cannot be reached"
            ) from error
        except (errors.HFValidationError, *broken, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise StartupError(f"{self}: cannot be downloaded: {reason[0]}") from error

    def _fetch(self, patterns: tuple[str, ...], on_progress: Fetching | None, commit: str | None = None) -> Path:
        files, folder = self._listed(patterns, commit), self._folder()
        blobs = folder / "blobs"
        missing = sum(one.file_size or 0 for one in files if one.will_download) - begun_bytes(blobs)
        free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free
        if missing > max(free - SPARE_BYTES, 0):
            raise StartupError(
                f"{self}: {size_text(missing)} are to be fetched, and {size_text(free)} are free in {folder.parent} "
                "(--download-dir names another folder)"
            )
        with nullcontext() if on_progress is None or missing <= 0 else _watched(blobs, missing, on_progress):
            fetch_large(self.model, blobs, files)
            return self._snapshot(*patterns, commit=commit)

    def _listed(self, patterns: tuple[str, ...], commit: str | None) -> list[Any]:
        """Files with sizes, and whether they are there; none where the hub cannot be asked."""
        from huggingface_hub import errors, snapshot_download

        try:
            return list(snapshot_download(dry_run=True, **self._asked(patterns, commit)))
        except (errors.DryRunError, errors.OfflineModeIsEnabled):
            return []

    def _folder(self) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        root = Path(self.download_dir or constants.HF_HUB_CACHE)
        return root / repo_folder_name(repo_id=self.model, repo_type="model")

    def _snapshot(self, *patterns: str, commit: str | None = None, local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(local_files_only=local_files_only, **self._asked(patterns, commit)))

    def _asked(self, patterns: tuple[str, ...], commit: str | None) -> dict[str, Any]:
        return {
            "repo_id": self.model,
            "revision": commit or self.revision,
            "cache_dir": self.download_dir,
            "allow_patterns": list(patterns),
            "ignore_patterns": list(_HUB_IGNORED),
        }


def _has_weights(snapshot: Path) -> bool:
    """Whether all that an index names is there; of one without an index, any."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        named = (read_json(snapshot / name) or {}).get("weight_map")
        if isinstance(named, dict):
            return all((snapshot / str(file)).is_file() for file in set(named.values()))
    return any(snapshot.glob("*.safetensors")) or any(snapshot.glob("pytorch_model*.bin"))


@contextmanager
def _watched(folder: Path, missing_bytes: int, on_progress: Fetching) -> Iterator[None]:
    """Tells how much of what is missing has come into the folder."""

    def held() -> int:
        return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())

    def watch() -> None:
        while not is_over.wait(WATCH_S):
            with suppress(OSError):  # a file that was renamed meanwhile
                on_progress(min((held() - before) / missing_bytes, 1.0))

    before, is_over = held(), threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        on_progress(1.0)
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the hub's own, where progress is shown in another way."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            enable_progress_bars()


def text_model_of(folder: Path) -> str | None:
    """The second repository that a checkpoint takes its language model from (Ultravox), if it names one."""
    named = (read_json(folder / "config.json") or {}).get("text_model_id")
    return named if isinstance(named, str) and named else None
