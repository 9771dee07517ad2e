"""The built-in model: made by its tool, small, and a checkpoint like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import sensorium
from sensorium.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
DEMO = Path(sensorium.__file__).parent / "demo"


def test_the_committed_files_are_what_the_tool_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "tools/make_demo.py", str(tmp_path)], cwd=ROOT, check=True)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in DEMO.iterdir()}
    for file in tmp_path.iterdir():
        if file.name == "tokenizer.json":  # its layout is the tokenizers library's business
            made, kept = (json.loads((folder / file.name).read_text())["model"] for folder in (tmp_path, DEMO))
            assert (made["vocab"], made["merges"]) == (kept["vocab"], kept["merges"])
        else:
            assert file.read_bytes() == (DEMO / file.name).read_bytes()


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 2_000_000


def test_it_opens_like_any_checkpoint() -> None:
    checkpoint = open_checkpoint(DEMO)
    assert checkpoint.architecture == "Qwen2VLForConditionalGeneration"
    assert checkpoint.vocab_size == 1024
    assert checkpoint.chat_template
    assert len(checkpoint.stop_token_ids) == 2
