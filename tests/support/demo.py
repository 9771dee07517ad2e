"""The built-in model's token numbers, as its own files have them."""

from __future__ import annotations

import json
from pathlib import Path

import sensorium

FOLDER = Path(sensorium.__file__).parent / "demo"
_ADDED = json.loads((FOLDER / "tokenizer.json").read_text())["added_tokens"]
IDS: dict[str, int] = {token["content"]: token["id"] for token in _ADDED}
SPECIAL = frozenset(token["id"] for token in _ADDED if token["special"])
END, IMAGE, VIDEO = IDS["<|im_end|>"], IDS["<|IMAGE|>"], IDS["<|VIDEO|>"]
VOCAB_SIZE: int = json.loads((FOLDER / "config.json").read_text())["text_config"]["vocab_size"]
