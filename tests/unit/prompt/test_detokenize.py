"""R18: streamed text is exact at every token boundary, whatever the tokens are."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizers import byte_level, sentencepiece, unigram, wordpiece

from sensorium.prompt.detokenize import Detokenizer
from sensorium.prompt.pieces import TokenBytes
from sensorium.prompt.tokenizer import Tokenizer

TOKENIZERS = {
    "byte_level": Tokenizer(byte_level(), {}),
    "llama": Tokenizer(sentencepiece(), {}),
    "wordpiece": Tokenizer(wordpiece(), {}),
    "unigram": Tokenizer(unigram(), {}),
}
FAMILY = "Ein 👩‍👩‍👧‍👦 sagt: naïve 日本語 — ok!"
QUICK = settings(max_examples=80, deadline=None)


def streamed(tokenizer: Tokenizer, ids: list[int], steps: list[int] | None = None, **options: object) -> list[str]:
    """Pieces of text, `steps` tokens at a time (one by default), the flushed rest last."""
    detokenizer = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    pieces, at = [], 0
    for step in steps or [1] * len(ids):
        pieces.append(detokenizer.push(tuple(ids[at : at + step])))
        at += step
    return [*pieces, detokenizer.push(tuple(ids[at:])), detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
@QUICK
@given(data=st.data())
def test_any_ids_give_the_text_of_decoding_them_at_once(name: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    text = "".join(streamed(tokenizer, ids, skip_special_tokens=skip))
    if name == "llama" and "\ufffd" in whole:
        return  # invalid bytes: decoding at once also loses their valid neighbours
    assert text == whole


@QUICK
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30), steps=st.lists(st.integers(1, 4)))
def test_characters_arrive_whole(text: str, steps: list[int]) -> None:
    for name in ("byte_level", "llama"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode(tokenizer.escape(text))
        pieces = streamed(tokenizer, ids, steps)
        assert "".join(pieces) == text.replace("\ufdd0", "\ufffd")
        assert text.count("\ufffd") == "".join(pieces).count("\ufffd")


def test_emoji_of_several_characters_and_bytes() -> None:
    for name in ("byte_level", "llama"):
        pieces = streamed(TOKENIZERS[name], TOKENIZERS[name].encode(FAMILY))
        assert "".join(pieces) == FAMILY
        assert "\ufffd" not in "".join(pieces)
        assert pieces[-1] == ""


def test_a_character_cut_off_by_the_end_shows_only_then() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("👧")[:-1]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces[:-1]) == ""
    assert pieces[-1] == tokenizer.decode(ids) != ""


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@QUICK
@given(data=st.data())
def test_stop_strings_cut_at_the_same_place_at_every_token_boundary(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text("abc\n é👧", min_size=1, max_size=20))
    stops = tuple(data.draw(st.lists(st.text("abc\n é👧", min_size=1, max_size=4), min_size=1, max_size=4)))
    include = data.draw(st.booleans())
    ids = (
        [token for character in text for token in tokenizer.encode("\n" + character)[len(tokenizer.encode("\n")) :]]
        if data.draw(st.booleans())
        else tokenizer.encode(text)
    )
    text = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer, stop=stops, include_stop=include)
    got, at = "", 0
    while at < len(ids):
        step = data.draw(st.integers(1, 5))
        got += detokenizer.push(tuple(ids[at : at + step]))
        at += step
    got += detokenizer.flush()
    wanted, reason = cut(text, stops, include)
    assert (got, detokenizer.stop_reason) == (wanted, reason)


def cut(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The rule, letter by letter: the first stop string that is complete, of several the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text.endswith(stop, 0, end)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def test_nothing_of_a_stop_string_is_sent_before_it_is_complete() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    for character_by_character in (True, False):
        text = "Yes.\n\nUser: no"
        ids = [t for c in text for t in tokenizer.encode(c)] if character_by_character else tokenizer.encode(text)
        sent = ""
        detokenizer = Detokenizer(tokenizer, stop=("\n\nUser:", "never"))
        for token in ids:
            sent += detokenizer.push((token,))
            assert "Yes.".startswith(sent)
        assert (sent, detokenizer.flush(), detokenizer.stop_reason) == ("Yes.", "", "\n\nUser:")


def test_a_stop_string_that_was_only_begun_is_sent_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, stop=("ok!!",))
    assert detokenizer.push(tokenizer.encode("is ok!")) == "is "
    assert detokenizer.stop_reason is None
    assert detokenizer.flush() == "ok!"
    assert detokenizer.flush() == ""


def test_stop_strings_before_min_tokens_do_not_count() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [token for character in "a.b.c.d" for token in tokenizer.encode(character)]
    for steps in ([1] * 7, [7], [2, 5], [3, 4]):
        detokenizer, at, text = Detokenizer(tokenizer, stop=(".",), min_tokens=3), 0, ""
        for step in steps:
            text += detokenizer.push(tuple(ids[at : at + step]))
            at += step
        assert (text, detokenizer.stop_reason) == ("a.b", ".")


def test_a_leading_space_is_kept_where_the_text_goes_on() -> None:
    tokenizer = TOKENIZERS["llama"]
    ids = tokenizer.encode("The quick")
    assert "".join(streamed(tokenizer, ids)) == "The quick"
    assert "".join(streamed(tokenizer, ids, keep_leading_space=True)) == " The quick"


def test_special_tokens_show_when_asked_for() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a<|im_end|>b<think>")
    assert "".join(streamed(tokenizer, ids)) == "ab<think>"
    assert "".join(streamed(tokenizer, ids, skip_special_tokens=False)) == "a<|im_end|>b<think>"


def test_decoders_whose_tokens_have_no_bytes_of_their_own() -> None:
    assert TokenBytes.of(wordpiece()) is None
    assert TokenBytes.of(unigram()) is None
    tokenizer = TOKENIZERS["wordpiece"]
    ids = tokenizer.encode("the quick brown fox, jumps.")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["random", "half a character", "special", "stop"])
def test_time_is_linear_in_the_number_of_tokens(name: str, kind: str) -> None:
    """A model that repeats half a character, or its end token with `ignore_eos`, must not cost more and more."""
    tokenizer = TOKENIZERS[name]
    rng = random.Random(0)
    byte = tokenizer.token_to_id("<0xE2>" if name == "llama" else "â")
    if kind == "half a character" and byte is None:
        return
    options = {"stop": ("a" * 200, "b" * 200)} if kind == "stop" else {}
    special = min(tokenizer.special_ids)

    def seconds(count: int) -> float:
        choices: dict[str, list[Any]] = {
            "random": [rng.randrange(tokenizer.vocab_size) for _ in range(count)],
            "special": [special] * count,
            "half a character": [byte] * count,
            "stop": [tokenizer.encode("a")[-1]] * count,
        }
        detokenizer = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
        begin = time.thread_time()
        for token in choices[kind]:
            detokenizer.push((token,))
        return time.thread_time() - begin

    few = min(seconds(500) for _ in range(3))
    many = min(seconds(5000) for _ in range(3))
    assert many < 40 * max(few, 1e-4)
    assert many / 5000 < 100e-6
