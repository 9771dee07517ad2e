"""Writes four small checkpoints with vocabularies of published size into FOLDER: what a server of several models holds.

    python benchmarks/catalog_models.py FOLDER [--vocabulary 151936] [--pieces 250000]

A chat model that sees images (Qwen2-VL), an embedder (BERT), a reranker (BERT with one label) and Whisper, with random
weights of some megabytes. Each has a tokenizer of so many words, with as many merges where its kind has them. With
--pieces embedder and reranker have one of XLM-RoBERTa's kind, of so many pieces in three scripts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CHAT += ["<|video_pad|>"]
SPEECH = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
SPEECH += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
TIMES = [f"<|{0.02 * step:.2f}|>" for step in range(1501)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTHS = {"max_target_positions": 64, "max_source_positions": 1500}
SYLLABLES = (
    [first + second for first in "bcdfghjklmnprstvwz" for second in "aeiou"],
    [first + second for first in "бвгдклмнпрст" for second in "аеиоуы"],
    [chr(0x4E00 + number) for number in range(5000)],
)
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}


def words(count: int) -> Iterator[str]:
    chance = random.Random(0)
    made: set[str] = set()
    while len(made) < count:
        word = "".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 10)))
        if word not in made:
            made.add(word)
            yield word


def byte_level(folder: Path, size: int, special: list[str]) -> dict[str, int]:
    """A BPE of `size` tokens and as many merges -> the ids of the special ones."""
    chance = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    beginnings = [*string.ascii_lowercase, "\u0120"]
    while len(tokens) < size - len(special):
        left, right = chance.choice(beginnings), chance.choice(string.ascii_lowercase)
        if (token := left + right) in vocab:
            continue
        vocab[token] = len(tokens)
        merges.append((left, right))
        tokens.append(token)
        if len(token) < 12:
            beginnings.append(token)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    save_tokenizer(folder, tokenizer, eos_token=special[0])
    found: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return {token: found[token] for token in special}


def word_pieces(folder: Path, size: int) -> int:
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase]
    known += [f"##{letter}" for letter in string.ascii_lowercase]
    vocab = {word: number for number, word in enumerate([*known, *words(size - len(known))])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    save_tokenizer(folder, tokenizer, **{f"{name}_token": token for name, token in names.items()})
    return len(vocab)


def pieces(count: int) -> Iterator[str]:
    """Of one to six syllables, more than half of them at the beginning of a word."""
    chance = random.Random(0)
    made: set[str] = set()
    while len(made) < count:
        script = chance.choices(SYLLABLES, (60, 25, 15))[0]
        length = min(1 + int(chance.expovariate(0.5)), 6)
        piece = "\u2581" * (chance.random() < 0.6) + "".join(chance.choices(script, k=length))
        if piece not in made:
            made.add(piece)
            yield piece


def unigram(folder: Path, size: int) -> None:
    chance = random.Random(0)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    scored = [(name, 0.0) for name in names]
    scored += [(piece, -8 - 6 * chance.random()) for piece in pieces(size - len(names))]
    tokenizer = Tokenizer(models.Unigram(scored, names.index("<unk>"), False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    kinds = zip(("bos", "pad", "eos", "unk"), names, strict=True)
    save_tokenizer(folder, tokenizer, **{f"{kind}_token": name for kind, name in kinds})


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **named: str) -> None:
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def make_chat(folder: Path, size: int) -> None:
    ids = byte_level(folder, size, CHAT)
    text = {**NARROW, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = Qwen2VLConfig(
        text_config={**text, **rope, "vocab_size": size, "eos_token_id": ids["<|im_end|>"]},
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 16},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    save(Qwen2VLForConditionalGeneration(config), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    sizes = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 64, "patch_size": 14, "temporal_patch_size": 2}
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": 2}
    kind = {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**kind, **sizes, **means}))


def make_bert(folder: Path, size: int, kind: type[PreTrainedModel], **options: int) -> None:
    config = BertConfig(vocab_size=word_pieces(folder, size), num_attention_heads=2, **NARROW, **options)
    save(kind(config), folder)


def make_xlm_roberta(folder: Path, size: int, kind: type[PreTrainedModel], **options: int) -> None:
    unigram(folder, size)
    config = XLMRobertaConfig(vocab_size=size, num_attention_heads=2, **NARROW, **options)
    save(kind(config), folder)


def make_whisper(folder: Path, size: int) -> None:
    ids = byte_level(folder, size, [*SPEECH, *TIMES])
    ends = {f"{name}_token_id": ids["<|endoftext|>"] for name in ("eos", "bos", "pad")}
    start = {"decoder_start_token_id": ids["<|startoftranscript|>"]}
    parts = itertools.product(("encoder", "decoder"), (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32)))
    shape = {f"{part}_{name}": number for part, (name, number) in parts}
    model = WhisperForConditionalGeneration(
        WhisperConfig(**LENGTHS, vocab_size=size, d_model=16, **shape, **ends, **start)
    )
    model.generation_config = GenerationConfig(
        **ends,
        **start,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        is_multilingual=True,
        max_length=32,
    )
    save(model, folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--pieces", type=int, help="of an embedder and a reranker as XLM-RoBERTa is")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder, size = arguments.folder, arguments.vocabulary
    make_chat(folder / "chat", size)
    if arguments.pieces is None:
        make_bert(folder / "embedder", size, BertModel)
        make_bert(folder / "reranker", size, BertForSequenceClassification, num_labels=1)
    else:
        make_xlm_roberta(folder / "embedder", arguments.pieces, XLMRobertaModel)
        make_xlm_roberta(folder / "reranker", arguments.pieces, XLMRobertaForSequenceClassification, num_labels=1)
    make_whisper(folder / "whisper", size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
