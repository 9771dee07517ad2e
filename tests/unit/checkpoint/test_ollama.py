"""Ollama's store: which of its models are found, under which names, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sensorium.checkpoint.ollama import is_ollama_store, ollama_models

KIND = "application/vnd.ollama.image."


def stored(root: Path, name: str, *layers: tuple[str, bytes], registry: str = "registry.ollama.ai") -> dict[str, Any]:
    """A model of the store, whose manifest is returned; `name` is namespace/name/tag."""
    entries = []
    for kind, content in layers:
        digest = hashlib.sha256(content).hexdigest()
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        (root / "blobs" / f"sha256-{digest}").write_bytes(content)
        entries.append({"mediaType": KIND + kind, "digest": f"sha256:{digest}", "size": len(content)})
    manifest = root / "manifests" / registry / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    stated = {"schemaVersion": 2, "layers": entries}
    manifest.write_text(json.dumps(stated))
    return stated


def test_names_and_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored(tmp_path, "library/llava/7b", ("model", b"GGUF1"), ("projector", b"GGUF2"), ("template", b"{{ .Prompt }}"))
    stored(tmp_path, "someone/qwen/latest", ("model", b"GGUF3"), ("params", b"{}"), ("license", b"MIT"))
    stored(tmp_path, "a/b/c", ("model", b"GGUF1"), registry="hf.co")
    assert is_ollama_store(tmp_path) and not is_ollama_store(tmp_path / "blobs")
    with caplog.at_level(logging.INFO):
        found = ollama_models(tmp_path)
    assert [one.name for one in found] == ["hf.co/a/b:c", "llava:7b", "someone/qwen:latest"]
    llava = found[1]
    assert llava.file.read_bytes() == b"GGUF1" and llava.tower is not None and llava.tower.read_bytes() == b"GGUF2"
    assert [record.getMessage() for record in caplog.records] == [
        "Ollama's own params and template are passed over: templates and sampling defaults are those of the GGUF files"
    ]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([("tensor", b"x")], "single tensors"),
        ([("model", b"x"), ("adapter", b"y")], "adapter"),
        ([("template", b"x")], "names no model"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layers: list[tuple[str, bytes]], said: str
) -> None:
    stored(tmp_path, "library/x/latest", *layers)
    assert ollama_models(tmp_path) == []
    assert said in caplog.text and "x:latest" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda stated: stated["layers"][0].update(digest="sha256:../../etc/passwd"),
        lambda stated: stated["layers"][0].update(digest="sha256:" + "0" * 64),
        lambda stated: stated["layers"][0].update(digest=5),
        lambda stated: stated.update(layers={"a": 1}),
        lambda stated: stated["layers"].insert(0, "text"),
    ],
)
def test_hostile_manifests(tmp_path: Path, change: Any) -> None:
    """No path of a manifest is followed, and none ends the start."""
    stated = stored(tmp_path, "library/x/latest", ("model", b"GGUF"))
    change(stated)
    (tmp_path / "manifests" / "registry.ollama.ai" / "library" / "x" / "latest").write_text(json.dumps(stated))
    (tmp_path / "manifests" / "registry.ollama.ai" / "library" / "x" / "broken").write_text("[" * 100_000)
    assert [one.file.parent for one in ollama_models(tmp_path)] in ([], [tmp_path / "blobs"])


def test_a_name_with_control_characters_is_told_as_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored(tmp_path, "library/a\nb/latest", ("model", b"GGUF"))
    assert ollama_models(tmp_path) == []
    assert r"'a\nb:latest'" in caplog.text
