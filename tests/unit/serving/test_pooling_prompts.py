"""Texts and pairs for models that pool, against transformers' tokenizers; templates that are known by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sensorium.errors import ContextLengthError, RequestError
from sensorium.prompt.builtin import NAMED, POOLING, pooling_template_of
from sensorium.prompt.encode import PairLimits, Truncation, encode_pairs, encode_texts
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.template import pooling_template_source, template_source
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
    reference = PreTrainedTokenizerFast(
        tokenizer_object=raw_tokenizer(request.param),
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids"],
    )
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
        expected = reference(
            text, add_special_tokens=add_special_tokens, truncation=max_tokens is not None, max_length=max_tokens
        )["input_ids"]
        assert ids.tolist() == expected, text
    again = encode_texts(tokenizer, TEXTS[:1], add_special_tokens=add_special_tokens)
    assert again[0].tolist() == reference(TEXTS[0], add_special_tokens=add_special_tokens)["input_ids"]


@pytest.mark.parametrize("total", [None, 4, 5, 7, 8, 11, 100])
def test_pairs(both: tuple[Tokenizer, Any], total: int | None) -> None:
    tokenizer, reference = both
    pairs = [*PAIRS, *((document, query) for query, document in PAIRS)]
    for (query, document), (ids, types) in zip(
        pairs, encode_pairs(tokenizer, pairs, PairLimits(total=total)), strict=True
    ):
        expected = reference(query, document, truncation=bool(total), max_length=total)
        assert ids.tolist() == expected["input_ids"]
        if tokenizer.raw.post_processor is not None:  # else nothing reads them
            assert types.tolist() == expected["token_type_ids"]


def test_parts_of_pairs_are_cut_each_for_itself() -> None:
    tokenizer = Tokenizer(raw_tokenizer("bert"), {})
    limits = PairLimits(max_query_tokens=1, max_document_tokens=2)
    found = [ids.tolist() for ids, _ in encode_pairs(tokenizer, [("a b", "c d e"), ("c d e", "a b")], limits)]
    assert found == [[2, 4, 3, 6, 7, 3], [2, 6, 3, 4, 5, 3]]  # the same text on both sides keeps both lengths
    with pytest.raises(ContextLengthError, match="3 special tokens, which do not fit into the 2"):
        encode_pairs(tokenizer, [("a b c d e", "f")], PairLimits(total=2))


def test_the_far_end_of_a_long_text_is_not_looked_at() -> None:
    text = "a " * 50_000 + "b " * 50_000
    assert Truncation(3).shorten(text) == text[:65536]
    assert Truncation(3, "left").shorten(text) == text[-65536:]
    assert Truncation(2000).shorten(text) == text[:128_000]


# Special tokens that tokenizer_config.json asks for.


def frame_folder(folder: Path, single: str, **config: Any) -> Tokenizer:
    """A tokenizer whose tokenizer.json has the special tokens of `single`, beside the flags of its config."""
    raw = raw_tokenizer("decoder")
    raw.add_special_tokens(["<s>", "</s>"])
    ids = {token: raw.token_to_id(token) for token in ("<s>", "</s>")}
    if single:
        raw.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=list(ids.items())
        )
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return Tokenizer.from_folder(folder)


def words(tokenizer: Tokenizer, text: str, **options: Any) -> str:
    ids = encode_texts(tokenizer, [text], **{"add_special_tokens": True, **options})[0]
    return " ".join(str(tokenizer.id_to_token(int(token))) for token in ids)


@pytest.mark.parametrize(
    ("single", "flags", "expected"),
    [
        ("<s> $A", {"add_eos_token": True}, "<s> a b </s>"),  # e5-mistral
        ("<s> $A", {"add_bos_token": True, "add_eos_token": True}, "<s> a b </s>"),
        ("<s> $A </s>", {"add_bos_token": True, "add_eos_token": True}, "<s> a b </s>"),
        ("", {"add_eos_token": True}, "a b </s>"),
        ("", {"add_bos_token": True}, "<s> a b"),
        ("$A </s>", {"add_bos_token": True}, "<s> a b </s>"),
        ("", {"add_bos_token": True, "add_eos_token": True}, "<s> a b </s>"),
        ("<s> $A", {"add_bos_token": False, "add_eos_token": True}, "a b </s>"),
        ("<s> $A </s>", {"add_eos_token": False}, "<s> a b"),
        ("<s> $A </s>", {"add_bos_token": False, "add_eos_token": False}, "a b"),
        ("$A </s>", {}, "a b </s>"),
        ("<s> $A", {}, "<s> a b"),
        ("", {"add_bos_token": False}, "a b"),
        ("<s> $A", {"add_eos_token": True, "eos_token": None}, "<s> a b"),
        ("<s> $A", {"add_eos_token": True, "eos_token": {"content": "</s>", "special": True}}, "<s> a b </s>"),
    ],
)
def test_flags_of_the_config_frame_whole_texts(
    tmp_path: Path, single: str, flags: dict[str, Any], expected: str
) -> None:
    tokenizer = frame_folder(tmp_path, single, tokenizer_class="LlamaTokenizerFast", **flags)
    assert words(tokenizer, "a b") == expected
    assert words(tokenizer, "a b", add_special_tokens=False) == "a b"
    length = len(expected.split())
    assert words(tokenizer, "a b c d", truncation=Truncation(length)) == expected
    assert words(tokenizer, "c d a b", truncation=Truncation(length, "left")) == expected
    first, second = (expected.replace("a b", text) for text in ("a b", "c"))
    ids, types = encode_pairs(tokenizer, [("a b", "c")], PairLimits())[0]
    assert " ".join(str(tokenizer.id_to_token(int(token))) for token in ids) == f"{first} {second}"
    assert len(types) == len(ids)


def test_saved_padding_is_no_frame(tmp_path: Path) -> None:
    frame_folder(tmp_path, "<s> $A")
    raw = RawTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_padding(length=8, pad_token="</s>", pad_id=raw.token_to_id("</s>"))
    raw.enable_truncation(4)
    raw.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert words(Tokenizer.from_folder(tmp_path), "a b c d") == "<s> a b c d </s>"


def test_a_text_that_goes_on_has_no_end(tmp_path: Path) -> None:
    """Prompts to be completed are as tokenizer.json has them, as in transformers 5."""
    tokenizer = frame_folder(tmp_path, "<s> $A", tokenizer_class="LlamaTokenizer", add_eos_token=True)
    assert tokenizer.encode("a b", add_special_tokens=True) == [tokenizer.token_to_id("<s>"), 4, 5]


def test_other_classes_never_dropped_tokens(tmp_path: Path) -> None:
    for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", None):
        flags = {"tokenizer_class": name, "add_bos_token": False, "add_eos_token": False}
        assert words(frame_folder(tmp_path, "<s> $A </s>", **flags), "a") == "<s> a </s>"
        flags = {"tokenizer_class": name, "add_bos_token": False, "add_eos_token": True}
        assert words(frame_folder(tmp_path, "<s> $A", **flags), "a") == "<s> a </s>"


# Templates by name.


def template_of(source: str, *modalities: Modality) -> LocalTemplate:
    raw = raw_tokenizer("decoder")
    raw.add_special_tokens(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    )
    words = {"dse": "<|vision_start|><|image_pad|><|vision_end|>"}
    return LocalTemplate(
        source,
        Tokenizer(raw, {}),
        modalities=modalities,
        placeholder=lambda kind, index: words["dse"] if "vision_start" in source else f"<|image_{index + 1}|>",
    )


def user(*parts: TextPart | MediaPart) -> Message:
    return Message("user", parts)


def test_templates_of_embedding_models() -> None:
    picture, words = MediaPart("image"), TextPart("Query: what?")
    dse = template_of(POOLING["dse-qwen2"], "image")
    for generates in (False, True):
        assert dse.render([user(picture, words)], add_generation_prompt=generates) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>Query: what?<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
        )
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
