"""The built-in model's files: small, ordinary, what the tool writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import folder
import torch
from batches import Reader
from tokenizers import Tokenizer
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

import sensorium
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.prompt.messages import MediaPart, Message, TextPart

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


# The weights were trained before the tool knew functions: with fewer tokens, a layer less, and no place for functions.
BEFORE = {"vocab_size": 1408, "num_hidden_layers": 5}


def test_its_shape_is_the_tools(tmp_path: Path) -> None:
    folder.write(tmp_path, Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    for file in tmp_path.glob("*.json*"):
        if file.name != "tokenizer.json":
            written = json.loads(file.read_text())
            if "text_config" in written:
                written["text_config"] |= BEFORE
            assert written == json.loads((DEMO / file.name).read_text()), file.name


def test_its_template_is_the_tools_where_there_are_no_functions(tmp_path: Path) -> None:
    image, video, audio = (MediaPart(kind) for kind in ("image", "video", "audio"))
    messages = [
        Message("system", (TextPart("Be brief."),)),
        Message("user", (TextPart("What"), image, video, TextPart("is this?"), audio)),
        Message("assistant", (TextPart("A red circle."),)),
        Message("user", (TextPart("Sure?"),)),
    ]
    shutil.copytree(DEMO, tmp_path / "demo")
    (tmp_path / "demo" / "chat_template.jinja").write_text(folder.CHAT_TEMPLATE)
    before, after = (Reader(place).template for place in (DEMO, tmp_path / "demo"))
    for length in (2, 4):
        assert before.render(messages[:length]) == after.render(messages[:length])
