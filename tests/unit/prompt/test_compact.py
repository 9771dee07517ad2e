"""A tokenizer that Python reads for the library is the one that the library reads."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from weakref import WeakValueDictionary

import pytest
from support.tiny_tokenizers import byte_level, sentencepiece, unigram, wordpiece
from tokenizers import Tokenizer as RawTokenizer

from sensorium.prompt import compact
from sensorium.prompt.tokenizer import Tokenizer

RAW = {"byte_level": byte_level(), "llama": sentencepiece(), "unigram": unigram(), "wordpiece": wordpiece()}
READ_BY_LIBRARY = {"unigram", "wordpiece", "dropout"}


def stated(name: str, change: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RAW[name].to_str())
    model = found["model"]
    if change == "old_merges":
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    elif change == "dropout":
        model["dropout"] = 0.5
    elif change == "options":
        model |= {"ignore_merges": True, "fuse_unk": True}
    return found


CHANGES = ["", "old_merges", "options", "dropout"]
CASES = [(name, change) for name in ("byte_level", "llama") for change in CHANGES]


@pytest.mark.parametrize(("name", "change"), [*CASES, ("unigram", ""), ("wordpiece", "")])
def test_it_is_the_librarys_tokenizer(name: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "LARGE_BYTES", 0)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(stated(name, change)))
    build = Mock(wraps=compact._built)
    monkeypatch.setattr(compact, "_built", build)
    (own, _), other = compact.read_tokenizer(file), RawTokenizer.from_file(str(file))
    assert own.to_str() == other.to_str()
    if change != "dropout":  # which makes tokens random
        text = "The quick <|im_end|> fox <think>\u00e9</think>"
        assert own.encode(text).ids == other.encode(text).ids
    assert build.called == READ_BY_LIBRARY.isdisjoint((name, change))


@pytest.mark.parametrize(
    "text", ['{"type": "BPE"', '["type", {"type": "BPE"}]', '{"model": {"type": "BPE", "vocab": 3}}']
)
def test_what_is_no_tokenizer_is_judged_by_the_library(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "LARGE_BYTES", 0)
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(Exception):  # noqa: B017 - the library raises nothing narrower
        compact.read_tokenizer(file)


def test_files_with_the_same_words_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model and the embedder made of it differ in what stands around a text, and in added tokens."""
    monkeypatch.setattr(compact, "LARGE_BYTES", 0)
    monkeypatch.setattr(compact, "_READ", WeakValueDictionary())  # other tests may have some
    read = Mock(wraps=compact._model_of)
    monkeypatch.setattr(compact, "_model_of", read)
    chat, embedder = stated("byte_level", ""), stated("byte_level", "")
    embedder["added_tokens"] = embedder["added_tokens"][:-1]
    embedder["post_processor"] = None
    folders = [tmp_path / "chat", tmp_path / "embedder", tmp_path / "other"]
    for folder, contents in zip(folders, (chat, embedder, stated("llama", "")), strict=True):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(contents))
    made = [Tokenizer.from_folder(folder) for folder in folders]
    assert read.call_count == 2
    assert len(compact._READ) == 2
    for folder, one in zip(folders, made, strict=True):
        alone = RawTokenizer.from_file(str(folder / "tokenizer.json"))
        assert one.raw.encode("a quick <|im_end|> fox").ids == alone.encode("a quick <|im_end|> fox").ids
        assert one.raw.get_vocab_size() == alone.get_vocab_size()
    del made, one
    gc.collect()
    assert not compact._READ
