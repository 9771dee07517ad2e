"""What a published model's name tells where its files do not. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def known(folder: Path, table: Mapping[str, T]) -> T | None:
    """The entry of the first key, in lower case, that is a part of the folder's name or of that in the hub's cache."""
    cached = [part for part in folder.parts[-3:] if part.startswith("models--")]
    names = [name.lower() for name in (folder.name, *cached)]
    return next((entry for key, entry in table.items() if any(key in name for name in names)), None)


@dataclass(frozen=True, slots=True)
class KnownEmbedder:
    """`end` stands behind every text, also where a copy of tokenizer.json has lost it. `sizes` to which vectors may be
    cut: () for any, None for none."""

    end: str | None = None
    sizes: tuple[int, ...] | None = None


_EMBEDDERS: Mapping[str, KnownEmbedder] = {
    "qwen3-embedding": KnownEmbedder("<|endoftext|>", ()),
    "qwen3-vl-embedding": KnownEmbedder(None, ()),
    "embeddinggemma": KnownEmbedder(None, (512, 256, 128)),
}


def known_embedder(folder: Path) -> KnownEmbedder:
    """Nothing of a folder whose name is not known."""
    return known(folder, _EMBEDDERS) or KnownEmbedder()
