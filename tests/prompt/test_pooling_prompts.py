"""Texts and pairs for models that pool, against transformers' tokenizers; templates that are known by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sensorium.errors import ContextLengthError, RequestError
from sensorium.prompt.builtin import NAMED, POOLING, pooling_template_of
from sensorium.prompt.encode import PairLimits, Truncation, encode_pairs, encode_texts
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.template import ChatTemplate, pooling_template_source, template_source
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Modality

LETTERS = "abcdefghij"
TEXTS = ["a b c", "", "j", "a b c d e f g h i j", "a [SEP] b", "  a   b "]
PAIRS = [("a b", "c d e"), ("a b", "j"), ("a b c d e", "a b c d e f g")]


def raw_tokenizer(kind: str) -> RawTokenizer:
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS])}
    raw = RawTokenizer(models.WordLevel(vocab, "[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    if kind == "bert":
        raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    elif kind == "roberta":
        raw.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    return raw


@pytest.fixture(params=["bert", "roberta", "decoder"])
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    reference = PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(request.param), cls_token="[CLS]",
                                        sep_token="[SEP]", pad_token="[PAD]",
                                        model_input_names=["input_ids", "token_type_ids"])
    return Tokenizer(raw_tokenizer(request.param), {}), reference


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_tokens", [None, 2, 3, 5, 100])
def test_texts(both: tuple[Tokenizer, Any], add_special_tokens: bool, side: Any, max_tokens: int | None) -> None:
    tokenizer, reference = both
    reference.truncation_side = side
    truncation = None if max_tokens is None else Truncation(max_tokens, side)
    found = encode_texts(tokenizer, TEXTS, add_special_tokens=add_special_tokens, truncation=truncation)
    for text, ids in zip(TEXTS, found, strict=True):
        expected = reference(text, add_special_tokens=add_special_tokens, truncation=max_tokens is not None,
                             max_length=max_tokens)["input_ids"]
        assert ids.tolist() == expected, text
    again = encode_texts(tokenizer, TEXTS[:1], add_special_tokens=add_special_tokens)
    assert again[0].tolist() == reference(TEXTS[0], add_special_tokens=add_special_tokens)["input_ids"]


@pytest.mark.parametrize("total", [None, 7, 11, 100])
def test_pairs(both: tuple[Tokenizer, Any], total: int | None) -> None:
    tokenizer, reference = both
    pairs = PAIRS if total is None or total > 7 else [pair for pair in PAIRS if len(pair[0]) < 5]
    for (query, document), (ids, types) in zip(pairs, encode_pairs(tokenizer, pairs, PairLimits(total=total)),
                                               strict=True):
        expected = reference(query, document, truncation="only_second" if total else False, max_length=total)
        assert ids.tolist() == expected["input_ids"]
        if tokenizer.raw.post_processor is not None:  # else nothing reads them
            assert types.tolist() == expected["token_type_ids"]


def test_parts_of_pairs_are_cut_each_for_itself() -> None:
    tokenizer = Tokenizer(raw_tokenizer("bert"), {})
    limits = PairLimits(max_query_tokens=1, max_document_tokens=2)
    found = [ids.tolist() for ids, _ in encode_pairs(tokenizer, [("a b", "c d e"), ("c d e", "a b")], limits)]
    assert found == [[2, 4, 3, 6, 7, 3], [2, 6, 3, 4, 5, 3]]  # the same text on both sides keeps both lengths
    with pytest.raises(ContextLengthError, match="leaves no room"):
        encode_pairs(tokenizer, [("a b c d e", "f")], PairLimits(total=7))


def test_the_far_end_of_a_long_text_is_not_looked_at() -> None:
    text = "a " * 50_000 + "b " * 50_000
    assert Truncation(3).shorten(text) == text[:65536]
    assert Truncation(3, "left").shorten(text) == text[-65536:]
    assert Truncation(2000).shorten(text) == text[:128_000]


# Templates by name.


def template_of(source: str, *modalities: Modality) -> ChatTemplate:
    raw = raw_tokenizer("decoder")
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>",
                            "<|vision_end|>"])
    words = {"dse": "<|vision_start|><|image_pad|><|vision_end|>"}
    return ChatTemplate(source, Tokenizer(raw, {}), modalities=modalities, placeholder=lambda kind, index: (
        words["dse"] if "vision_start" in source else f"<|image_{index + 1}|>"))


def user(*parts: TextPart | MediaPart) -> Message:
    return Message("user", parts)


def test_templates_of_embedding_models() -> None:
    picture, words = MediaPart("image"), TextPart("Query: what?")
    dse = template_of(POOLING["dse-qwen2"], "image")
    for generates in (False, True):
        assert dse.render([user(picture, words)], add_generation_prompt=generates) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>Query: what?<|im_end|>\n<|im_start|>assistant\n<|endoftext|>")
    vlm2vec = template_of(POOLING["vlm2vec"], "image")
    assert vlm2vec.render([user(picture, TextPart("Represent it."))]) == "<|image_1|> Represent it."
    assert vlm2vec.render([user(TextPart("Both:"), picture, picture)]) == "Both: <|image_1|> <|image_2|>"
    assert vlm2vec.render([user(TextPart("A cat"))], add_generation_prompt=False) == "A cat"
    with pytest.raises(RequestError, match="exactly one message"):
        vlm2vec.render([user(words), user(words)])


def test_they_are_known_by_the_models_name_and_yield_to_the_operator() -> None:
    dse = POOLING["dse-qwen2"]
    assert pooling_template_of(["MrLight/dse-qwen2-2b-mrl-v1"]) == dse
    assert pooling_template_of(["mine", "models--MrLight--dse-qwen2-2b-mrl-v1", "snapshots", "0a1b"]) == dse
    assert pooling_template_of(["/models/VLM2Vec-Full/"]) == POOLING["vlm2vec"]
    assert pooling_template_of(["Qwen2-VL-2B", "dse-qwen2/other"]) is None
    assert pooling_template_source("{{ messages }}", ["dse-qwen2"]) is None


def test_template_files_of_tutorials_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(raw_tokenizer("decoder"), {})
    for name, source in NAMED.items():
        for flag in (name, f"template_{name}.jinja", f"examples/template_{name}.jinja"):
            assert template_source(flag, None, "LlamaForCausalLM", tokenizer) == source
    (tmp_path / "template_llava.jinja").write_text("mine")
    assert template_source("template_llava.jinja", None, "LlamaForCausalLM", tokenizer) == "mine"
