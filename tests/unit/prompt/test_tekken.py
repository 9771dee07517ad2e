"""tekken.json against the byte-pair encoding that its ranks were taken from."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import CORPUS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from sensorium.errors import CheckpointError
from sensorium.prompt.tekken import _letters, tekken_tokenizer
from sensorium.prompt.tokenizer import Tokenizer as OurTokenizer

PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AUDIO]")
NUM_SPECIAL = 10


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = [letter for _, letter in sorted(_letters().items())]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Bytes first, as tekken has them, then the merges in order."""
    byte_of = {letter: byte for byte, letter in _letters().items()}
    merged = ["".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [bytes([byte]) for byte in range(256)] + [
        bytes(byte_of[c] for c in name) for name in dict.fromkeys(merged)
    ]
    stated = {
        "config": {
            **{"pattern": PATTERN, "default_num_special_tokens": NUM_SPECIAL, "version": "v7"},
            **{"default_vocab_size": NUM_SPECIAL + len(tokens), "num_vocab_tokens": len(tokens) + 5, **config},
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate([*tokens, b"beyond the vocabulary"])
        ],
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(SPECIAL)],
    }
    (folder / "tekken.json").write_text(json.dumps(stated))
    return folder / "tekken.json"


def test_texts_are_cut_as_the_ranks_say(tmp_path: Path) -> None:
    reference = trained()
    made = tekken_tokenizer(write(tmp_path, reference))
    texts = [*CORPUS.splitlines(), "unseen words: zebra 12345\n\n/x", "a" * 40, "", " ", "日本語 🙂 \r\n end"]
    for text in texts:
        expected = reference.encode(text).tokens
        found = made.encode(text, add_special_tokens=False)
        assert found.tokens == expected
        assert made.decode(found.ids) == text
    assert made.encode("a").ids[0] == 1 == made.token_to_id("<s>")
    assert made.encode("[INST]a[/INST]", add_special_tokens=False).ids[::2] == [3, 4]
    assert made.token_to_id("<SPECIAL_9>") == 9
    assert min(made.encode("The chef", add_special_tokens=False).ids) >= NUM_SPECIAL


def test_a_folder_that_has_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, trained())
    found = OurTokenizer.from_folder(folder)
    assert found.decode(found.encode("The chef prepared a meal.")) == "The chef prepared a meal."
    assert found.token_to_id("[AUDIO]") == 5


def test_what_is_no_tekken_file(tmp_path: Path) -> None:
    file = tmp_path / "tekken.json"
    for text in ("{}", "no json", '{"config": {}, "vocab": 3}', '{"config": {"pattern": "a"}}'):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"tekken\.json"):
            tekken_tokenizer(file)
