"""A checkpoint's tokenizer: text to ids exactly as transformers' fast tokenizer would, and back.

Text that was `escape`d stays text: no literal in it becomes a token. Instances are shared between threads; nothing of
them changes after construction but caches.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tokenizers import AddedToken, Encoding, normalizers, processors
from tokenizers import Tokenizer as RawTokenizer

from sensorium.errors import CheckpointError, RequestError
from sensorium.prompt.compact import SharedWords, read_tokenizer
from sensorium.prompt.convert import converted_tokenizer
from sensorium.prompt.literals import MARK, NAME, Literals, alternatives, rename_true, sanitize
from sensorium.prompt.pieces import TokenBytes
from sensorium.types import Vocabulary

_log = logging.getLogger(__name__)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_FLAGS_DECIDE = ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")  # what `add_bos_token` and its like are law for
_CASE_DECIDES = ("Bert", "DistilBert", "Electra", "MPNet")  # what `do_lower_case` and its like are law for
_WORST_CHARS_PER_TOKEN = 16  # at least this many are assumed before a text is called too long unread


class Tokenizer:
    """`named_tokens` are the tokens that a chat template knows by name (bos_token, eos_token, …)."""

    def __init__(
        self,
        raw: RawTokenizer,
        named_tokens: Mapping[str, str],
        *,
        vocab_size: int = 0,
        literals: Iterable[str] = (),
        frame: processors.PostProcessor | None = None,
        file: Path | None = None,
    ) -> None:
        """`vocab_size` is the model's, which may be padded beyond the tokens that have a text. `frame` gives whole
        texts, which nothing is to be added to, their special tokens; None: as everywhere else. `file` is the
        tokenizer.json that all comes from."""
        raw.no_truncation()
        raw.no_padding()
        self.raw = raw
        self.named_tokens = dict(named_tokens)
        added: dict[int, AddedToken] = raw.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(raw.get_vocab_size(), max(added, default=-1) + 1, vocab_size)
        self.token_bytes = TokenBytes.of(raw)
        # Some tokenizers do not call `<|im_start|>` and its like special: what looks like one is one to us.
        special = {token.content for token in added.values() if token.special or token.content.startswith("<|")}
        special.update(self.named_tokens.values())
        self._special = Literals(special)
        self._all = Literals(special.union(literals))
        self._unmarked = re.compile(alternatives(self.added_tokens))
        self._verbatim = _VerbatimVocabulary(raw, added)
        self._longest_token: int | None = None
        self.frame = frame
        self._file = file
        self._shared: Tokenizer | None = None  # held by those that have its parts, so that others find it
        self._words: SharedWords | None = None  # held for the same reason

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int = 0) -> Tokenizer:
        """That of a model's folder. Models whose files say the same share one: an embedder and its reranker often do,
        and one takes up to some hundred megabytes."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            file = converted_tokenizer(folder)
        key = _digest((file, *(folder / name for name in _CONFIGS)), vocab_size)
        with (
            _READING
        ):  # models that are loaded at the same time find each other's; reading holds the interpreter anyway
            shared = _READ.get(key)
            if shared is None:
                shared = _READ[key] = cls._of_files(folder, file, vocab_size)
        own = copy.copy(shared)
        own._file, own._shared = file, shared
        return own

    @classmethod
    def _of_files(cls, folder: Path, file: Path, vocab_size: int) -> Tokenizer:
        config = _read_json(folder / "tokenizer_config.json")
        try:
            raw, words = read_tokenizer(file)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file.name} of the model cannot be read: {error}") from error
        named = _named_tokens(config, _read_json(folder / "special_tokens_map.json"))
        _set_case(raw, config)
        _add_declared_tokens(raw, config, named)
        made = cls(raw, named, vocab_size=vocab_size, frame=_configured_frame(raw, config, named), file=file)
        made._words = words
        return made

    def with_literals(self, literals: Iterable[str], *, special: bool = False) -> Tokenizer:
        """The same tokenizer, whose `escape` also breaks these; `special`: in text of the model's own, too."""
        copied = copy.copy(self)
        literals = frozenset(literals)
        copied._all = Literals(self._all.all | literals)
        if special:
            copied._special = Literals(self._special.all | literals)
        return copied

    def ending_with(self, token: str) -> Tokenizer:
        """The same tokenizer with this token behind every whole text; itself if it is there, or no token of its."""
        token_id = self.token_to_id(token)
        begin, end = _around(self.framed(self.raw.encode("a", add_special_tokens=False)))
        if token_id is None or end[-1:] == [token_id]:
            return self
        copied = copy.copy(self)
        copied.frame = _frame(self.raw, begin, [*end, token_id])
        return copied

    def vocabulary(self, ends: Sequence[int]) -> Vocabulary | None:
        """What the engine needs to hold answers to a grammar; `ends` are the model's end tokens. None if tokens have no
        bytes of their own."""
        if self.token_bytes is None or self._file is None:
            return None
        added: dict[int, AddedToken] = self.raw.get_added_tokens_decoder()
        tokens = [
            (token_id, token.content, token.special or token.content in self._special.all)
            for token_id, token in sorted(added.items())
        ]
        return Vocabulary(str(self._file), tuple(tokens), tuple(ends), self.token_bytes.lead)

    @property
    def bos_token(self) -> str | None:
        return self.named_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.named_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.named_tokens.get("pad_token")

    def escape(self, text: str, *, special_only: bool = False) -> str:
        """Untrusted text in a form that `encode` reads as plain text whatever literals it contains.

        `special_only` leaves alone the literals that are not special tokens (`<think>`, `<tool_call>`): for text of
        the model's own, where a template looks for them.
        """
        return (self._special if special_only else self._all).escape(text)

    def sanitize(self, text: str) -> str:
        """Untrusted text whose literals shall be tokens, as `encode` takes it."""
        return sanitize(text)

    def unescape(self, text: str) -> str:
        """Escaped text as it was."""
        return text.replace(MARK, "")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids. Text without marks is tokenized in one go, all literals in it being tokens."""
        if MARK not in text:
            return encoded(self.raw, text, add_special_tokens).ids
        found = self._verbatim.encode(rename_true(text, self._unmarked, self._name_of), add_special_tokens)
        if found is not None:
            return found
        # The vocabulary itself makes a control token of plain letters (Unigram does): only a space keeps them apart.
        text = self._unmarked.sub(lambda match: self._name_of(match.group()), text).replace(MARK, " ")
        found = self._verbatim.encode(text, add_special_tokens)
        if found is None:
            raise RequestError(
                "The text has a control token that this model's vocabulary cannot write as plain text.",
                code="control_token_in_text",
            )
        return found

    def framed(self, text: Encoding, second: Encoding | None = None, *, add_special_tokens: bool = True) -> Encoding:
        """A whole text, or a pair of them, that was encoded without special tokens, with those it has as a whole."""
        if self.frame is None:
            return self.raw.post_process(text, second, add_special_tokens)
        return self.frame.process(text, second, add_special_tokens)

    def num_frame_tokens(self, *, is_pair: bool) -> int:
        """Special tokens that `framed` adds."""
        counted: int = (self.raw if self.frame is None else self.frame).num_special_tokens_to_add(is_pair)
        return counted

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.check_ids(token_ids)
        text: str = self.raw.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def check_ids(self, token_ids: Sequence[int], *, param: str | None = None) -> None:
        """RequestError unless every id is one of the vocabulary's."""
        if not token_ids:
            return
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocab_size:
            raise RequestError(
                f"Token id {low if low < 0 else high} is not in the vocabulary, which has the ids "
                f"0 to {self.vocab_size - 1}.",
                param=param,
                code="invalid_token_id",
            )

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self.raw.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        found: str | None = self.raw.id_to_token(token_id)
        return found

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """One token as text and bytes, for logprobs; bytes that are no whole character show as U+FFFD."""
        if self.token_bytes is None:
            text: str = self.raw.decode([token_id], skip_special_tokens=False)
            return text, text.encode()
        found = self.token_bytes[token_id]
        return found.decode("utf-8", "replace"), found

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens of a text, found without tokenizing it: no token is longer than the longest."""
        if self._longest_token is None:
            vocabulary: dict[str, int] = self.raw.get_vocab(with_added_tokens=True)
            self._longest_token = max(map(len, vocabulary), default=0)
        return len(text) // max(self._longest_token, _WORST_CHARS_PER_TOKEN)

    def _name_of(self, literal: str) -> str:
        return self._verbatim.names[literal]


_READ: WeakValueDictionary[bytes, Tokenizer] = WeakValueDictionary()
"""Those that a model has, by what their files say."""
_READING = threading.Lock()


class _VerbatimVocabulary:
    """The same model whose added tokens are only found under names that no text can contain.

    So plain text stays plain, and everything else (prefix spaces, stripping beside tokens) works as it does in the
    original. The vocabulary itself is shared, not copied.
    """

    def __init__(self, raw: RawTokenizer, added: Mapping[int, AddedToken]) -> None:
        self._raw = RawTokenizer(raw.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            if getattr(raw, part) is not None:
                setattr(self._raw, part, getattr(raw, part))
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.names: dict[str, str] = {}  # literal -> its name here
        self._id_of: dict[int, int] = {}  # id of a name here -> the model's id
        missing = dict(added)
        # Ids are given out from the number of words on. A vocabulary with gaps has words of its own there: try again.
        for attempt in range(1 + raw.get_vocab_size(with_added_tokens=True)):
            if not missing:
                break
            missing = self._add(raw, missing, attempt)

    def _add(self, raw: RawTokenizer, tokens: Mapping[int, AddedToken], attempt: int) -> dict[int, AddedToken]:
        """Add the tokens under new names; returns those whose new id means something else in the model."""
        names: dict[int, str] = {token_id: f"{NAME}{attempt}.{token_id};" for token_id in tokens}
        self._raw.add_special_tokens(
            [
                AddedToken(
                    names[token_id],
                    special=True,
                    normalized=False,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                )
                for token_id, token in tokens.items()
            ]
        )
        missing = dict(tokens)
        for token_id, name in names.items():
            new_id = self._raw.token_to_id(name)
            if new_id is not None and raw.model.id_to_token(new_id) is None:
                self.names[missing.pop(token_id).content] = name
                self._id_of[new_id] = token_id
        return missing

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """Ids of text whose tokens stand under their names; None if plain letters gave a special token."""
        encoding = encoded(self._raw, text, add_special_tokens)
        in_text = [
            token_id
            for token_id, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True)
            if not added and token_id not in self._id_of
        ]
        if not self._special.isdisjoint(in_text):
            return None
        return [self._id_of.get(token_id, token_id) for token_id in encoding.ids]


def encoded(raw: RawTokenizer, text: str, add_special_tokens: bool, *, with_offsets: bool = False) -> Encoding:
    """A text as tokens. The library's `encode` would keep every other thread waiting until it is done."""
    encode = raw.encode_batch if with_offsets else raw.encode_batch_fast
    (found,) = encode([text], add_special_tokens=add_special_tokens)
    return found


def _digest(files: Iterable[Path], vocab_size: int) -> bytes:
    """Of what the files say; of one that is not there, that."""
    found = hashlib.sha256(str(vocab_size).encode())
    for file in files:
        found.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return found.digest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.name} must be a JSON object")
    return found


def _content(token: Any) -> str | None:
    """A token as config files write it: its text, or an object with its text."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, str]:
    """The usual names and whatever else the config calls `…_token`."""
    found = {**special_tokens_map, **config}
    names = [*_NAMED, *(name for name in found if name.endswith("_token"))]
    return {name: content for name in names if (content := _content(found.get(name))) is not None}


def _configured_frame(
    raw: RawTokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> processors.PostProcessor | None:
    """Special tokens around a whole text where `add_bos_token` and `add_eos_token` say something else of them than
    tokenizer.json does. transformers 4 believed the flags, which embedders were trained with; 5 does not read them."""
    if not any(isinstance(config.get(name), bool) for name in ("add_bos_token", "add_eos_token")):
        return None
    raw.no_truncation()
    raw.no_padding()
    begin, end = _around(raw.encode("a"))
    decide = _class_name(config) in _FLAGS_DECIDE
    new_begin = _flagged(begin, 0, config.get("add_bos_token"), raw.token_to_id(named.get("bos_token", "")), decide)
    new_end = _flagged(end, -1, config.get("add_eos_token"), raw.token_to_id(named.get("eos_token", "")), decide)
    return None if (new_begin, new_end) == (begin, end) else _frame(raw, new_begin, new_end)


def _class_name(config: Mapping[str, Any]) -> str:
    """`BertTokenizerFast` -> `Bert`; empty where the file names no class."""
    return str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")


def _set_case(raw: RawTokenizer, config: Mapping[str, Any]) -> None:
    """Capitals, accents and Chinese characters as transformers' classes of BERT's kind read them: by the flags of
    tokenizer_config.json, or their defaults, whatever tokenizer.json says."""
    if _class_name(config) not in _CASE_DECIDES or not isinstance(raw.normalizer, normalizers.BertNormalizer):
        return
    accents = config.get("strip_accents")
    raw.normalizer = normalizers.BertNormalizer(
        clean_text=raw.normalizer.clean_text,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=None if accents is None else bool(accents),
        lowercase=bool(config.get("do_lower_case", True)),
    )


def _around(text: Encoding) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text that has no others."""
    is_added = text.special_tokens_mask
    before = is_added.index(0) if 0 in is_added else len(is_added)
    after = is_added[::-1].index(0) if 0 in is_added else 0
    return text.ids[:before], text.ids[len(text.ids) - after :]


def _frame(raw: RawTokenizer, begin: list[int], end: list[int]) -> processors.PostProcessor:
    """What puts these tokens before and behind a text, or each text of a pair."""
    parts = [("begin", begin), ("end", end)]
    special = [{"id": name, "ids": ids, "tokens": [str(raw.id_to_token(i)) for i in ids]} for name, ids in parts if ids]
    first, last = ("begin" if begin else ""), ("end" if end else "")
    template = [
        [piece for piece in (first and f"{first}:{side}", f"${'AB'[side]}:{side}", last and f"{last}:{side}") if piece]
        for side in (0, 1)
    ]
    return processors.TemplateProcessing(single=template[0], pair=template[0] + template[1], special_tokens=special)


def _flagged(ids: list[int], place: int, wanted: object, token_id: int | None, decide: bool) -> list[int]:
    """The special tokens on one side of a text with the one at `place` (0 or -1) that a flag puts or takes there."""
    has = bool(ids) and ids[place] == token_id
    if wanted is True and token_id is not None and not has:
        return [token_id, *ids] if place == 0 else [*ids, token_id]
    if wanted is False and decide and has:
        return ids[1:] if place == 0 else ids[:-1]
    return ids


def _add_declared_tokens(raw: RawTokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that only tokenizer_config.json has, in the order of their ids, so that they get these ids."""
    known = {token.content for token in raw.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(isinstance(key, str) and key.isdecimal() for key in declared):
        raise CheckpointError("tokenizer_config.json: 'added_tokens_decoder' must be an object of token ids")
    for token_id, token in sorted(declared.items(), key=lambda item: int(item[0])):
        content = _content(token)
        if content is None or content in known:
            continue
        flags = {name: bool(token.get(name)) for name in _FLAGS} if isinstance(token, dict) else {}
        raw.add_tokens([AddedToken(content, **flags)])
        known.add(content)
        if raw.token_to_id(content) != int(token_id):
            _log.warning(
                "tokenizer_config.json gives the token %r the id %s, but it gets %d.",
                content,
                token_id,
                raw.token_to_id(content),
            )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    wanted = [*named.values(), *(content for token in extra if (content := _content(token)) is not None)]
    raw.add_special_tokens(
        [
            AddedToken(content, special=True, normalized=False)
            for content in dict.fromkeys(wanted)
            if content not in known
        ]
    )
