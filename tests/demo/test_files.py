"""The built-in model's files: small, ordinary, what the tool writes."""

from __future__ import annotations

from pathlib import Path

import folder
import torch
from tokenizers import Tokenizer
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

import sensorium
from sensorium.checkpoint.configs import open_checkpoint

DEMO = Path(sensorium.__file__).parent / "demo"


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 20_000_000


def test_it_opens_like_any_checkpoint() -> None:
    checkpoint = open_checkpoint(DEMO)
    assert checkpoint.architecture == "Qwen2_5OmniThinkerForConditionalGeneration"
    assert checkpoint.chat_template
    assert len(checkpoint.stop_token_ids) == 2


def test_transformers_loads_every_tensor() -> None:
    _, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        DEMO, dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}  # tied to the embeddings


def test_its_files_are_the_tools(tmp_path: Path) -> None:
    folder.write(tmp_path, Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (DEMO / file.name).read_bytes(), file.name
