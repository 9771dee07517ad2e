"""Offsets of tokens count the characters of the text that is sent, whatever the tokenizer cuts it into."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from support.tiny_tokenizers import byte_level, id_of, sentencepiece, unigram
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import normalizers, processors

from sensorium.prompt.detokenize import Detokenizer
from sensorium.prompt.offsets import TextOffsets, prompt_offsets
from sensorium.prompt.tokenizer import Tokenizer

TEXTS = ["naïve café 你好 🙂 world", "e\u0301 a  b\n\n c", "  two spaces", "🙂🙂x", "a", " ", "𝒳 ﬁ ½"]


def trimming() -> RawTokenizer:
    """Tells a word's span without the space before it, as GPT-2's post-processor does."""
    raw = byte_level()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    return raw


def composing() -> RawTokenizer:
    """Composes accents before it cuts (Qwen2's NFC): its tokens' bytes are not those of the text."""
    raw = byte_level()
    raw.normalizer = normalizers.NFC()
    return raw


KINDS = [byte_level, trimming, composing, sentencepiece, lambda: sentencepiece(prefix_first=True), unigram]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    make: Callable[[], RawTokenizer] = request.param
    return Tokenizer(make(), {})


def shown(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    return [tokenizer.token_text(token_id)[0] for token_id in token_ids]


@pytest.mark.parametrize("text", TEXTS)
def test_whole_tokens_of_a_prompt_stand_where_they_say(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True)
    offsets = prompt_offsets(tokenizer, ids, text)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    for token, offset in zip(shown(tokenizer, ids), offsets, strict=True):
        # Sentencepiece's first token brings a space that the text does not have.
        if "\ufffd" not in token and token in text and not (offset == 0 and token.startswith(" ")):
            assert text[offset:].startswith(token), (token, offset)


def test_parts_of_a_character_stand_where_it_does() -> None:
    tokenizer = Tokenizer(byte_level(), {})
    text = "a🙂b你c"
    ids = [id_of(tokenizer.raw, name) for name in "aðŁĻĤbä½łc"]
    assert tokenizer.decode(ids) == text
    assert prompt_offsets(tokenizer, ids, text) == [0, 1, 1, 1, 1, 2, 3, 3, 3, 4]  # ids that no text gives: walked
    start, end = (tokenizer.added_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    text = "<|im_start|>a🙂<|im_end|>"
    assert prompt_offsets(tokenizer, [start, *ids[:5], end], text) == [0, 12, 13, 13, 13, 13, 14]
    assert prompt_offsets(tokenizer, tokenizer.encode(text), text)[-1] == 14


def test_a_broken_character_is_one() -> None:
    tokenizer = Tokenizer(byte_level(), {})
    a, *parts = (id_of(tokenizer.raw, name) for name in "aðŁĻĤ")
    end = tokenizer.added_tokens["<|im_end|>"]
    for ids, wanted in (
        ([parts[0], parts[1], a, a], [0, 0, 1, 2]),
        ([parts[1], a], [0, 1]),
        ([parts[0], parts[0], a], [0, 1, 2]),
        ([a, end, a], [0, 1, 1]),
        ([a, parts[0], end, parts[1], parts[2], parts[3], a], [0, 1, 1, 1, 1, 1, 2]),
    ):
        counted = TextOffsets(tokenizer, skip_special_tokens=True, keep_leading_space=True)
        found = [counted.begin(token_id) for token_id in ids]
        assert found == wanted, ids
        text = Detokenizer(tokenizer, keep_leading_space=True)
        whole = text.push(ids) + text.flush()
        assert [whole[offset] for token_id, offset in zip(ids, found, strict=True) if token_id == a] == (
            ["a"] * ids.count(a)
        )


def test_special_tokens_that_are_not_in_the_text_take_no_room() -> None:
    tokenizer = Tokenizer(sentencepiece(), {})
    ids = tokenizer.encode("fox 你", add_special_tokens=True)
    offsets = prompt_offsets(tokenizer, ids, "fox 你")
    assert shown(tokenizer, ids)[0] == "<s>"
    assert offsets[:2] == [0, 0]
    assert offsets[-3:] == [4, 4, 4]
    decoded = tokenizer.decode(ids, skip_special_tokens=False)  # as ids are echoed
    assert prompt_offsets(tokenizer, ids, decoded)[-3:] == [decoded.index("你")] * 3
