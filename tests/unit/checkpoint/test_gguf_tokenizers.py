"""The tokenizers that are made of GGUF's vocabularies, beside the original kinds, on texts of every sort.

All kinds had the originals' token ids of 20,000 texts too (`COUNT`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.gguf_writer import container
from support.many_texts import many_texts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, Qwen2Tokenizer, XLMRobertaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from sensorium.checkpoint.gguf_file import read_gguf
from sensorium.checkpoint.gguf_tokenizer import tokenizer_of

COUNT = 400
TEXTS, TRAINING = many_texts(COUNT, seed=20), many_texts(300, seed=21)
CONTROL, USER, BYTE = 3, 4, 6
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = TikTokenConverter().pattern
LOST_MERGES = 7  # every seventh merge is left out: only whole words then find its token

Learnt = tuple[dict[str, int], list[tuple[str, str]]]


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTE_LEVEL])


def composed(cut: Any, *, whole_words: bool = False) -> Callable[[Learnt], Tokenizer]:
    def make(learnt: Learnt) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(*learnt, ignore_merges=whole_words))
        tokenizer.pre_tokenizer = cut
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    return make


def class_of(made: Any) -> Callable[[Learnt], Tokenizer]:
    return lambda learnt: made(vocab=learnt[0], merges=learnt[1])._tokenizer


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
ORIGINALS: dict[str, Callable[[Learnt], Tokenizer]] = {
    "llama-bpe": composed(split(LLAMA3), whole_words=True),
    "smaug-bpe": composed(split(LLAMA3)),
    "qwen2": class_of(Qwen2Tokenizer),
    "qwen35": class_of(Qwen3_5Tokenizer),
    "glm4": composed(split(LLAMA3)),  # whose expression is Llama 3's
    "gpt-4o": composed(split(GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"])),
    "tekken": composed(split(GGUF_PRE_TOKENIZER_SPLITS["tekken"]), whole_words=True),
    "gpt-2": class_of(GPT2Tokenizer),
    "smollm": composed(DIGITS),
}


@pytest.fixture(scope="module")
def learnt() -> Learnt:
    """A vocabulary with merges across all that any kind keeps together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split(r"\s*\S+|\s+")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for index, pair in enumerate(model["merges"]) if index % LOST_MERGES]
    return model["vocab"], merges


def tokens_of(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]


def own(
    folder: Path, kind: str, original: Tokenizer, spelled: Sequence[str], *, architecture: str = "llama", **more: Any
) -> Tokenizer:
    """What is made of a file with nothing but this vocabulary."""
    added = original.get_added_tokens_decoder()
    types = [(CONTROL if added[i].special else USER) if i in added else 1 for i in range(len(spelled))]
    tokens = [added[i].content if i in added else token for i, token in enumerate(spelled)]
    types = [BYTE if token.startswith("<0x") else one for token, one in zip(tokens, types, strict=True)]
    metadata = {"model": kind, "tokens": tokens, "token_type": types, **more}
    keys = {f"tokenizer.ggml.{key}": one for key, one in metadata.items()}
    (folder / "m.gguf").write_bytes(container({"general.architecture": architecture, **keys}, {}))
    return Tokenizer.from_str(tokenizer_of(read_gguf(folder / "m.gguf"))[0])


def assert_same(found: Tokenizer, original: Tokenizer, texts: Sequence[str]) -> None:
    """Token ids, and the texts that they are again."""
    expected = original.encode_batch(texts)
    pairs = zip(texts, found.encode_batch(texts), expected, strict=True)
    differing = [(text, one.tokens, other.tokens) for text, one, other in pairs if one.ids != other.ids]
    assert not differing, (len(differing), differing[0])
    ids = [one.ids for one in expected]
    assert found.decode_batch(ids, skip_special_tokens=False) == original.decode_batch(ids, skip_special_tokens=False)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_kinds(tmp_path: Path, learnt: Learnt, pre: str) -> None:
    original = ORIGINALS[pre](learnt)
    original.add_special_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|eot|>", normalized=False)])
    original.add_tokens([AddedToken("<think>", normalized=False)])
    tokens = tokens_of(original)
    merges = [" ".join(pair) for pair in learnt[1]]
    found = own(tmp_path, "gpt2", original, tokens, pre=pre, merges=merges, add_bos_token=False)
    framed = [f"<|im_start|>{text}<|eot|>\n<think> {text}" for text in TEXTS[:50]]
    assert_same(found, original, [*TEXTS, *framed])


def sentencepiece(*, prefix: bool) -> tuple[Tokenizer, list[str]]:
    """Llama 2's kind and Gemma's, with the merges that transformers makes of a vocabulary; and its tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")][0 if prefix else 1 :]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{octet:02X}>" for octet in range(256))]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")  # while it is trained
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    stated = json.loads(tokenizer.to_str())
    words = {token: index for token, index in stated["model"]["vocab"].items() if index >= len(first)}
    merges = generate_merges(words, {token: -float(index) for token, index in words.items()})
    stated["model"]["merges"] = [list(pair) for pair in merges]
    stated["pre_tokenizer"] = None
    stated["added_tokens"] = [one for one in stated["added_tokens"] if not one["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(stated))
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return made, tokens_of(made)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma4"])
def test_sentencepiece_kind(tmp_path: Path, architecture: str) -> None:
    """Gemma 3's runs of spaces are spelled as such; Gemma's scores say nothing of the order, and Gemma 4 has merges."""
    is_gemma, has_merges = architecture != "llama", architecture == "gemma4"
    original, tokens = sentencepiece(prefix=not is_gemma)
    scores = [float(index) if is_gemma else -float(index) for index in range(len(tokens))]
    spelled = [t.replace("▁", " ") if is_gemma and len(t) > 1 and not t.strip("▁") else t for t in tokens]
    assert not is_gemma or "  " in spelled
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more: dict[str, Any] = {**ids, "scores": scores, "add_space_prefix": not is_gemma, "add_bos_token": False}
    if has_merges:
        more["merges"] = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    kind = "gemma4" if has_merges else "llama"
    spelled = tokens if has_merges else spelled
    assert_same(own(tmp_path, kind, original, spelled, architecture=architecture, **more), original, TEXTS)


def test_unigram_kind(tmp_path: Path) -> None:
    """XLM-RoBERTa's: tokens that nobody uses stand last in files, rated worse than anything."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False)
    learner.train_from_iterator(TRAINING, trainer)
    vocab = [(token, score) for token, score in json.loads(learner.to_str())["model"]["vocab"]]
    original = XLMRobertaTokenizer(vocab=vocab)._tokenizer
    tokens, scores = (list(part) for part in zip(*vocab, strict=True))
    unused = ["[PAD1000]", "▁[PAD1001]"]
    kinds = [2 if token == "<unk>" else CONTROL if token in special else 1 for token in tokens] + [5] * len(unused)
    more = {f"{name}_token_id": index for name, index in (("bos", 0), ("padding", 1), ("eos", 2), ("unknown", 3))}
    metadata = {"model": "t5", "tokens": tokens + unused, "scores": scores + [-1e4] * len(unused), "token_type": kinds}
    keys = {f"tokenizer.ggml.{key}": one for key, one in {**metadata, **more}.items()}
    (tmp_path / "m.gguf").write_bytes(container({"general.architecture": "bert", **keys}, {}))
    found = Tokenizer.from_str(tokenizer_of(read_gguf(tmp_path / "m.gguf"))[0])
    assert_same(found, original, [*TEXTS, "[PAD1000] [PAD1001]"])
    assert found.encode("a", "b").ids == original.encode("a", "b").ids


def test_a_normaliser_of_the_file(tmp_path: Path) -> None:
    """SentencePiece's table, bytes in GGUF, is text in tokenizer.json."""
    metadata = {"model": "t5", "tokens": ["a", "<unk>"], "scores": [-1.0, 0.0], "unknown_token_id": 1}
    keys = {f"tokenizer.ggml.{key}": one for key, one in {**metadata, "precompiled_charsmap": [4, 0, 0, 200]}.items()}
    (tmp_path / "m.gguf").write_bytes(container({"general.architecture": "bert", **keys}, {}))
    stated = json.loads(tokenizer_of(read_gguf(tmp_path / "m.gguf"))[0])
    assert stated["normalizer"] == {"type": "Precompiled", "precompiled_charsmap": "BAAAyA=="}


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_kind(tmp_path: Path, lower: bool) -> None:
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=lower),
        pre_tokenizers.BertPreTokenizer(),
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    )
    original = BertTokenizer(vocab=learner.get_vocab(), do_lower_case=lower)._tokenizer
    tokens = tokens_of(original)
    spelled = [token[2:] if token.startswith("##") else "▁" + token for token in tokens]
    ids = {"cls": 2, "seperator": 3, "padding": 0, "unknown": 1, "mask": 4}
    more: dict[str, Any] = {f"{name}_token_id": index for name, index in ids.items()}
    more["normalizer.lowercase"] = lower
    found = own(tmp_path, "bert", original, spelled, **more)
    assert_same(found, original, [*TEXTS, "a [MASK] b"])
