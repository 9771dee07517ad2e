"""Ollama's store of models: manifests that name blobs, of which one is a GGUF file and one may be its tower. Only read.

`manifests/REGISTRY/NAMESPACE/NAME/TAG` is JSON with layers; the layer of a digest is `blobs/sha256-HEX`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_MANIFEST_BYTES = 1 << 20
_KIND = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_PASSED_OVER = ("template", "params", "system", "messages", "license")  # a file's own template and sampling count
_DEFAULT = ("registry.ollama.ai", "library")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """`name` is Ollama's: name:tag, with namespace and registry before it where they are not the usual ones."""

    name: str
    file: Path
    tower: Path | None
    file_bytes: int


def is_ollama_store(root: Path) -> bool:
    return (root / "manifests").is_dir() and (root / "blobs").is_dir()


def ollama_models(root: Path) -> list[OllamaModel]:
    """Those that can be read, by name; a line of the log for each that cannot, and one for what is passed over."""
    found, passed = [], set[str]()
    for manifest in sorted(root.glob("manifests/*/*/*/*")):
        if not manifest.is_file():
            continue
        name, layers = _name(manifest), dict(_layers(manifest))
        if not name.isprintable():
            _log.warning("a model of Ollama's store is not served: its name is %r", name)
            continue
        why = _refusal(root, layers)
        if why is not None:
            _log.warning("%s of Ollama's store is not served: %s", name, why)
            continue
        passed |= layers.keys() & set(_PASSED_OVER[:-1])
        file, tower = _blob(root, layers["model"]), layers.get("projector")
        found.append(OllamaModel(name, file, None if tower is None else _blob(root, tower), file.stat().st_size))
    if passed:
        _log.info(
            "Ollama's own %s are passed over: templates and sampling defaults are those of the GGUF files",
            " and ".join(sorted(passed)),
        )
    return found


def _name(manifest: Path) -> str:
    registry, namespace, name, tag = manifest.parts[-4:]
    usual = (registry, namespace) == _DEFAULT
    before = "" if usual else f"{namespace}/" if registry == _DEFAULT[0] else f"{registry}/{namespace}/"
    return f"{before}{name}:{tag}"


def _layers(manifest: Path) -> Iterator[tuple[str, str]]:
    """(kind, hexadecimal digest) of each layer; none of what is no manifest."""
    try:
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            return
        stated: Any = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    layers = stated.get("layers") if isinstance(stated, dict) else None
    for layer in layers if isinstance(layers, list) else []:
        kind, digest = (layer.get(key) if isinstance(layer, dict) else None for key in ("mediaType", "digest"))
        match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if isinstance(kind, str) and kind.startswith(_KIND) and match is not None:
            yield kind.removeprefix(_KIND), match[1]


def _refusal(root: Path, layers: dict[str, str]) -> str | None:
    if "tensor" in layers:
        return "its weights are single tensors, not a GGUF file"
    if "adapter" in layers:
        return "it has an adapter; serve the base model with --lora and the adapter's own folder"
    if "model" not in layers:
        return "its manifest names no model"
    missing = [kind for kind in ("model", "projector") if kind in layers and not _blob(root, layers[kind]).is_file()]
    return f"the blob of its {missing[0]} is not there" if missing else None


def _blob(root: Path, digest: str) -> Path:
    return root / "blobs" / f"sha256-{digest}"
