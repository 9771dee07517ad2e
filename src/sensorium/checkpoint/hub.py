"""Where a model folder is: a local path, or the snapshot of a hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sensorium.checkpoint.values import read_json
from sensorium.errors import StartupError

_HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "*.safetensors")

_HUB_IGNORED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*.onnx", "coreml/*")

NO_GGUF = "which is not served; take the checkpoint that it was made of, with --quantization int4 or int8"

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def resolve(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """A local folder as it is, else the hub repository's snapshot: every file of one commit."""
    folder = Path(model)
    if model.startswith("~/"):
        folder = Path(os.path.expanduser(model))  # noqa: PTH111 - Path's raises without a home
    if model and folder.is_dir():
        return folder
    if model.endswith(".gguf"):
        raise StartupError(f"{model} is a GGUF file, {NO_GGUF}")
    if not _HUB_ID.fullmatch(model):
        raise StartupError(f"no such folder: {model}")
    snapshot = _snapshot(model, revision, download_dir, _HUB_PATTERNS)
    if not any(snapshot.glob("*.safetensors")):
        # The folder is named after the commit: the second call cannot get files of another one.
        snapshot = _snapshot(model, snapshot.name, download_dir, ("pytorch_model*.bin", "pytorch_model.bin.index.json"))
    return snapshot


def _snapshot(model: str, revision: str | None, download_dir: str | None, patterns: tuple[str, ...]) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    what = f"{model} (revision {revision})" if revision else model
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=list(patterns),
                ignore_patterns=list(_HUB_IGNORED),
            )
        )
    except errors.GatedRepoError as error:
        raise StartupError(f"{what}: the hub must grant you access to it first (then `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise StartupError(f"{what}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise StartupError(f"{what}: neither a local folder nor a repository that the hub shows you") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise StartupError(f"{what}: not a local folder, not downloaded yet, and the hub cannot be reached") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StartupError(f"{what}: cannot be downloaded: {reason[0]}") from error


def text_model_of(folder: Path) -> str | None:
    """The second repository that a checkpoint takes its language model from (Ultravox), if it names one."""
    named = (read_json(folder / "config.json") or {}).get("text_model_id")
    return named if isinstance(named, str) and named else None
