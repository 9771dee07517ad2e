"""GGUF's vocabulary -> tokenizer.json, so that it is read as any other checkpoint's."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sensorium.checkpoint.gguf_file import GgufFile, Strings
from sensorium.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
_WITH_RUNS = frozenset(
    {"gemma", "gemma2", "gemma3", "gemma3n", "gemma-embedding"}
)  # architectures with runs of spaces as tokens
_MAX_TOKEN = 1024  # characters of a token that is cut everywhere: the time is their square

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_CASED = (
    rf"{_WORD}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+",
    rf"{_WORD}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*",
)
_SLASHED = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}|{_REST}"
_O200K = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}"
_SEED = rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a byte-level text is cut before merging: by regular expressions, one after the other, then GPT-2's.

    `whole_words`: a piece that is a token needs no merges. `bos`: whether texts begin with it if the file does not say.
    """

    splits: tuple[str, ...]
    gpt2: bool = False
    nfc: bool = False  # what GGUF has no key for: the original normalises texts first
    whole_words: bool = False
    bos: bool = False


_LLAMA = _PreTokenizer((_LLAMA3,), whole_words=True, bos=True)
_QWEN = _PreTokenizer((_QWEN2,), nfc=True)
_GPT2 = _PreTokenizer((), gpt2=True)
_DIGITS = _PreTokenizer((r"\p{N}",), gpt2=True)
_PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "midm-2.0"), _LLAMA),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "f2llmv2"), _QWEN),
    "qwen35": _PreTokenizer((_QWEN35,), nfc=True),
    **dict.fromkeys(("kormo", "megrez"), _PreTokenizer((_QWEN2,))),
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "trillion", "mellum", "a.x-4.0", "roberta-bpe"), _GPT2),
    **dict.fromkeys(("mpt", "olmo", "modern-bert"), replace(_GPT2, nfc=True)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _PreTokenizer((_O200K,))),
    "tekken": _PreTokenizer((_TEKKEN,), whole_words=True, bos=True),
    "command-r": replace(_DIGITS, nfc=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "deepseek-coder": _PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    "seed-coder": _PreTokenizer((_SEED,)),
}
"""By `tokenizer.ggml.pre`."""


class Vocabulary:
    """The keys of a file's metadata that are its tokenizer's."""

    def __init__(self, file: GgufFile) -> None:
        self.name, self.all = file.path.name, file.metadata
        tokens = self.stored("tokens")
        if not isinstance(tokens, Strings) or not tokens:
            raise CheckpointError(f"{self.name} has no vocabulary ({_PREFIX}tokens)")
        self.tokens = list(tokens)
        self.types = self.numbers("token_type")

    def stored(self, key: str) -> Any:
        """As it stands, be it an array."""
        return self.all.get(_PREFIX + key)

    def get(self, key: str, default: Any = None) -> Any:
        """One value. CheckpointError if it is an array."""
        value = self.all.get(_PREFIX + key, default)
        if isinstance(value, np.ndarray | Strings):
            raise CheckpointError(f"{self.name}: {_PREFIX}{key} must be one value, not an array of {len(value)}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        return value if isinstance(value, bool) else default

    def numbers(self, key: str) -> list[Any]:
        """Of every token; [] if they are not there."""
        value = self.stored(key)
        if value is None:
            return []
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise CheckpointError(f"{self.name}: {_PREFIX}{key} must be an array of {len(self.tokens)} numbers")
        found: list[Any] = value.tolist()
        return found

    def token(self, name: str, default: int | None = None) -> str | None:
        """The text of `bos` and the like. What begins a text may be called `bos` where it is `cls`."""
        other = self.get("bos_token_id", default) if name == "cls" and default is not None else default
        token_id = self.get(f"{name}_token_id", other)
        if token_id is None:
            return None
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            return None
        return self.tokens[token_id]


def tokenizer_of(file: GgufFile) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json). CheckpointError if there is no such kind of tokenizer here."""
    stated = file.metadata.get("tokenizer.huggingface.json")
    vocabulary = Vocabulary(file)
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _merged, "t5": _unigram, "bert": _wordpiece}
    kind = vocabulary.get("model")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(
            f"{vocabulary.name}: a tokenizer of the kind {kind!r} is not supported ({', '.join(kinds)} are): put the "
            "original tokenizer.json beside the file"
        )
    named = {f"{name}_token": vocabulary.token(key, default) for name, (key, default) in _NAMED[kind].items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: one for key, one in named.items() if one is not None},
    }
    if isinstance(stated, str) and stated:
        return stated, config
    return json.dumps(kinds[kind](vocabulary), ensure_ascii=False), config


_NAMED: Mapping[str, Mapping[str, tuple[str, int | None]]] = {
    "gpt2": {
        **{"bos": ("bos", None), "eos": ("eos", None), "unk": ("unknown", None), "pad": ("padding", None)},
        **{"cls": ("cls", None), "sep": ("seperator", None), "mask": ("mask", None)},
    },
    "llama": {"bos": ("bos", 1), "eos": ("eos", 2), "unk": ("unknown", 0), "pad": ("padding", None)},
    "gemma4": {"bos": ("bos", None), "eos": ("eos", None), "unk": ("unknown", None), "pad": ("padding", None)},
    "t5": {
        **{"bos": ("bos", None), "eos": ("eos", 1), "unk": ("unknown", 2), "pad": ("padding", 0)},
        **{"cls": ("cls", None), "sep": ("seperator", None), "mask": ("mask", None)},
    },
    "bert": {
        "cls": ("cls", 101),
        "sep": ("seperator", 102),  # GGUF's spelling
        "pad": ("padding", 0),
        "mask": ("mask", 103),
        "unk": ("unknown", 100),
    },
}
"""Kind -> name in tokenizer_config.json -> name in GGUF, and its id where the file does not say."""


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """By name; "default" is the usual one."""
    found = {"default": metadata.get("tokenizer.chat_template")}
    names = metadata.get("tokenizer.chat_templates")
    for name in names if isinstance(names, Strings) else ():
        found[str(name)] = metadata.get(f"tokenizer.chat_template.{name}")
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _assembled(vocabulary: Vocabulary, model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    masked = None if model["type"] == "WordPiece" else vocabulary.get("mask_token_id")  # takes the space before it
    added = [
        {
            "id": token_id,
            "content": vocabulary.tokens[token_id],
            "single_word": False,
            "lstrip": token_id == masked,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER,
        }
        for token_id, kind in enumerate(vocabulary.types)
        if kind in (_CONTROL, _USER) or (kind == _UNKNOWN and model["type"] != "WordPiece")
        if vocabulary.tokens[token_id].strip(_SPACE)
    ]
    none = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **none, "added_tokens": added, **parts, "model": model}


def _framed(vocabulary: Vocabulary, begin: str | None, end: str | None, otherwise: Any = None) -> Any:
    """A post-processor that puts these tokens around a text."""
    if begin is None and end is None:
        return otherwise
    ids = {one: vocabulary.tokens.index(one) for one in (begin, end) if one is not None}

    kind = vocabulary.get("model")
    apart = end if vocabulary.flag("add_sep_token", default=kind == "t5") else None
    between = begin if end is None else apart

    def side(name: str, kind: int, *, first: bool) -> list[dict[str, Any]]:
        before = begin if first else between
        parts: list[dict[str, Any]] = [] if before is None else [{"SpecialToken": {"id": before, "type_id": kind}}]
        parts.append({"Sequence": {"id": name, "type_id": kind}})
        return [*parts, *([] if end is None else [{"SpecialToken": {"id": end, "type_id": kind}}])]

    second = 1 if kind == "bert" else 0
    return {
        "type": "TemplateProcessing",
        "single": side("A", 0, first=True),
        "pair": [*side("A", 0, first=True), *side("B", second, first=False)],
        "special_tokens": {one: {"id": one, "ids": [number], "tokens": [one]} for one, number in ids.items()},
    }


def _edges(vocabulary: Vocabulary, *, bos: bool, eos: bool = False, otherwise: Any = None) -> Any:
    """What is added to a text: `bos` and `eos` where the file does not say."""
    named = _NAMED[vocabulary.get("model")]
    begin, end = (vocabulary.token(*named[name]) for name in ("bos", "eos"))
    return _framed(
        vocabulary,
        begin if vocabulary.flag("add_bos_token", default=bos) else None,
        end if vocabulary.flag("add_eos_token", default=eos) else None,
        otherwise,
    )


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    """GPT-2's kind: tokens are spelled in an alphabet of bytes, merges are given."""
    pre = vocabulary.get("pre")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{vocabulary.name}: the pre-tokenizer {pre!r} ({_PREFIX}pre) is not supported: put the original "
            "tokenizer.json beside the file"
        )
    how = _PRE_TOKENIZERS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": how.gpt2}
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in how.splits
    ]
    model = {**_bpe(vocabulary, _stored_merges(vocabulary)), "ignore_merges": how.whole_words}
    return _assembled(
        vocabulary,
        model,
        normalizer={"type": "NFC"} if how.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        post_processor=_edges(vocabulary, bos=how.bos, otherwise={**byte_level, "use_regex": True}),
        decoder={**byte_level, "use_regex": True},
    )


def _stored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    merges = vocabulary.stored("merges")
    if not isinstance(merges, Strings):
        raise CheckpointError(f"{vocabulary.name} has no {_PREFIX}merges")
    return [pair for merge in merges if (pair := _pair(merge))]


def _pair(merge: str) -> tuple[str, str] | None:
    """The first space after the first character parts the two."""
    at = merge.find(" ", 1)
    return None if at < 0 else (merge[:at], merge[at + 1 :])


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    vocab = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    if len(vocab) < len(vocabulary.tokens):
        raise CheckpointError(f"{vocabulary.name}: its vocabulary has a token twice")
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
        **more,
    }


def _merged(vocabulary: Vocabulary) -> dict[str, Any]:
    """Gemma 4's kind."""
    return _sentencepiece(vocabulary, has_merges=True)


def _sentencepiece(vocabulary: Vocabulary, *, has_merges: bool = False) -> dict[str, Any]:
    """Llama 2's kind, and with merges Gemma 4's. Spaces are a visible character, what is unknown is bytes."""
    is_gemma = vocabulary.all.get("general.architecture") in _WITH_RUNS
    if is_gemma:
        runs = {
            index: token for index, token in enumerate(vocabulary.tokens) if len(token) > 1 and not token.strip(" ")
        }
        for index, token in runs.items():
            vocabulary.tokens[index] = token.replace(" ", _SPACE)
    prefix = vocabulary.flag("add_space_prefix", default=not has_merges)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace]
    decoding: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoding.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.token("unknown", None if has_merges else 0)
    merges = _stored_merges(vocabulary) if has_merges else merges_of(vocabulary, by_score=not is_gemma)
    return _assembled(
        vocabulary,
        _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
        normalizer={"type": "Sequence", "normalizers": steps},
        post_processor=_edges(vocabulary, bos=True),
        decoder={"type": "Sequence", "decoders": decoding},
    )


def merges_of(vocabulary: Vocabulary, *, by_score: bool) -> list[tuple[str, str]]:
    """All cuts of tokens into two tokens, those of the best token first: by scores, or by ids."""
    scores = vocabulary.numbers("scores") if by_score else []
    if by_score and not scores:
        raise CheckpointError(f"{vocabulary.name} has no {_PREFIX}scores")
    mergeable = {
        token: token_id
        for token_id, token in enumerate(vocabulary.tokens)
        if not vocabulary.types or vocabulary.types[token_id] in (_NORMAL, _USER)
    }
    if (longest := max(map(len, mergeable), default=0)) > _MAX_TOKEN:
        raise CheckpointError(f"{vocabulary.name} has a token of {longest} characters; {_MAX_TOKEN} are supported")
    found: list[tuple[float, tuple[str, str]]] = []
    for token, token_id in mergeable.items():
        cuts = [
            (mergeable[token[:at]], mergeable[token[at:]])
            for at in range(1, len(token))
            if token[:at] in mergeable and token[at:] in mergeable
        ]
        rank = -scores[token_id] if by_score else token_id
        found += [(rank, (vocabulary.tokens[left], vocabulary.tokens[right])) for left, right in sorted(cuts)]
    found.sort(key=lambda one: one[0])
    return [pair for _, pair in found]


def _unigram(vocabulary: Vocabulary) -> dict[str, Any]:
    """XLM-RoBERTa's kind (and T5's): the likeliest tokens of a text. Its normaliser is a table of the file."""
    scores, table = vocabulary.numbers("scores"), vocabulary.stored("precompiled_charsmap")
    unknown = vocabulary.get("unknown_token_id", 2)
    if not scores or not isinstance(unknown, int) or not 0 <= unknown < len(scores):
        raise CheckpointError(f"{vocabulary.name} has no {_PREFIX}scores or no unknown_token_id for them")
    used = [one for one, kind in zip(scores, vocabulary.types or [_NORMAL], strict=False) if kind != _UNUSED]
    least = min(used, default=0.0)  # of which what is unknown is rated
    vocab = [
        [f"{token} (unused {index})", least]
        if vocabulary.types and vocabulary.types[index] == _UNUSED
        else [token, one]
        for index, (token, one) in enumerate(zip(vocabulary.tokens, scores, strict=True))
    ]
    metaspace = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "always" if vocabulary.flag("add_space_prefix", default=True) else "never",
        "split": True,
    }
    packed = base64.b64encode(table.astype(np.uint8).tobytes()).decode() if isinstance(table, np.ndarray) else ""
    return _assembled(
        vocabulary,
        {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": False},
        normalizer={"type": "Precompiled", "precompiled_charsmap": packed} if packed else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        post_processor=_edges(vocabulary, bos=True, eos=True),
        decoder=metaspace,
    )


def _wordpiece(vocabulary: Vocabulary) -> dict[str, Any]:
    """BERT's kind; the words' beginnings are marked in the file, not their continuations."""
    controls = {index for index, kind in enumerate(vocabulary.types) if kind in (_CONTROL, _UNKNOWN, _UNUSED)}
    spelled = [
        token if index in controls else token[1:] if token.startswith(_SPACE) else f"##{token}"
        for index, token in enumerate(vocabulary.tokens)
    ]
    vocabulary.tokens[:] = spelled
    unknown, is_lower = vocabulary.token("unknown", 100), vocabulary.flag("normalizer.lowercase", default=True)
    model = {
        "type": "WordPiece",
        "unk_token": unknown or "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: index for index, token in enumerate(spelled)},
    }
    cleaning = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": is_lower}
    return _assembled(
        vocabulary,
        model,
        normalizer={"type": "BertNormalizer", **cleaning},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=_framed(vocabulary, vocabulary.token("cls", 101), vocabulary.token("seperator", 102)),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def with_token(tokenizer: str, token: tuple[str, int] | None) -> str:
    """tokenizer.json with one more special token (text, id)."""
    if token is None:
        return tokenizer
    stated = json.loads(tokenizer)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    stated["added_tokens"].append({"id": token[1], "content": token[0], **flags, "special": True})
    return json.dumps(stated, ensure_ascii=False)
