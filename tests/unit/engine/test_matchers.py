"""The grammar library through its C interface, with a tokenizer in another process: the same as its Python classes."""

from __future__ import annotations

import logging
import math
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from support import tiny_tokenizers
from support.drawing import sequence
from support.engine_harness import Result, bench, random_prompt, request, tokens_of
from support.tiny_tokenizers import id_of

from sensorium.engine import grammars, matchers, spelling
from sensorium.engine.constraint import Constraint
from sensorium.engine.masks import Masks
from sensorium.engine.matchers import NativeMatcher, NativeTokenizer, library
from sensorium.engine.sampler import Sampler
from sensorium.models.base import Model
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.system.priority import ENDED_FIRST, NICENESS
from sensorium.types import Grammar, Vocabulary

pytestmark = pytest.mark.skipif(library() is None, reason="this llguidance has no C interface that is known")

SCHEMA = (
    '{"type": "object", "properties": {"the name": {"type": "string", "maxLength": 9}, "a colour": {"enum": ["red", '
    '"green"]}, "size": {"type": "integer", "minimum": 0, "maximum": 150}}, "required": ["the name", "a colour"], '
    '"additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}'
)
GRAMMARS = [
    Grammar("json", SCHEMA),
    Grammar("regex", "(the same beginning|the same end), [0-9]{3} times[a-zü ]{0,5}"),
    Grammar("lark", 'start: (A | "b")+\nA: /[a-z ,]{3,9}/'),
]


@pytest.fixture(scope="module")
def vocabulary(folder: Path, model: Model) -> Vocabulary:
    found = Tokenizer.from_folder(folder, vocab_size=model.checkpoint.vocab_size).vocabulary(
        model.checkpoint.stop_token_ids
    )
    assert found is not None
    return found


def opened(vocabulary: Vocabulary, vocab_size: int) -> tuple[NativeTokenizer, spelling.Speller]:
    native, speller = library(), spelling.Speller(vocabulary, vocab_size)
    assert native is not None
    ends = spelling.ends_within(vocabulary, vocab_size)
    return NativeTokenizer(native, speller.table(), ends, speller.spelled), speller


@pytest.fixture(scope="module")
def native(vocabulary: Vocabulary, model: Model) -> Iterator[NativeTokenizer]:
    made, speller = opened(vocabulary, model.checkpoint.vocab_size)
    yield made
    speller.close()


@pytest.fixture(scope="module")
def plain(vocabulary: Vocabulary, model: Model) -> LLTokenizer:
    return grammars.open_tokenizer(vocabulary, model.checkpoint.vocab_size)


def walk(one: NativeMatcher, other: LLMatcher, seed: int) -> list[int]:
    """A random answer of which both say the same at each token."""
    random, said = Random(seed), list[int]()
    while len(said) < 60:
        forced = one.compute_ff_tokens()
        assert forced == other.compute_ff_tokens()
        if forced:
            assert one.consume_tokens(forced) and other.consume_tokens(forced)
            said += forced
        assert (one.is_stopped(), one.is_error()) == (other.is_stopped(), other.is_error())
        if one.is_stopped():
            break
        mask = one.compute_bitmask()
        assert other.compute_bitmask()[: len(mask)] == mask
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        said.append(int(random.choice(allowed)))
        assert one.consume_token(said[-1]) and other.consume_token(said[-1])
        if random.random() < 0.2:
            one = one.deep_copy()
    return said


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_it_says_what_the_python_classes_say(native: NativeTokenizer, plain: LLTokenizer, grammar: Grammar) -> None:
    text = grammars.described(grammar)
    answers = [
        walk(native.matcher(text, grammars.LIMITS), LLMatcher(plain, text, log_level=0, limits=grammars.LIMITS), seed)
        for seed in range(6)
    ]
    assert len(set(map(tuple, answers))) > 1
    whole = native.matcher(text, grammars.LIMITS)
    assert whole.validate_tokens(answers[0]) == len(answers[0])
    assert whole.validate_tokens([0, *answers[0]]) == 0


class Unasked(NativeMatcher):
    """One that native code is not told of."""

    functions = None  # type: ignore[assignment]


LONG = Grammar("regex", "[ab] after which there is a long text without any choice, [0-9]{9}")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("grammar", [*GRAMMARS, LONG], ids=["json", "regex", "lark", "long"])
def test_rows_are_drawn_and_taken_by_native_code_as_one_by_one(
    native: NativeTokenizer, vocabulary: Vocabulary, model: Model, grammar: Grammar, temperature: float
) -> None:
    """The same tokens and the same ends, whatever else a request wishes."""
    vocab_size, text = model.checkpoint.vocab_size, grammars.described(grammar)

    def answers(kind: type[NativeMatcher]) -> list[list[int]]:
        rng, masks, running = np.random.default_rng(3), Masks(8, vocab_size), []
        for row in range(8):
            bias = ((int(rng.integers(vocab_size)), -math.inf),) if row % 2 else ()
            seq = sequence([1], [], row, seed=row, temperature=temperature, logit_bias=bias)
            found = native.matcher(text, grammars.LIMITS)
            late = sorted(spelling.ends_within(vocabulary, vocab_size)) if row % 3 else []
            seq.slot, seq.constraint = row, Constraint(kind(native, found._library.clone_matcher(found.address)), late)
            running.append(seq)
        sampler, everyone = Sampler(0, masks), list(running)
        for _ in range(50):
            logits = torch.from_numpy((3 * rng.standard_normal((8, vocab_size))).astype(np.float32))
            masks.begin(running, may_ask=True)
            sampled = sampler.sample(logits[[seq.slot for seq in running]], running)
            assert not sampled.failed
            for seq, token in zip(running, sampled.token_ids, strict=True):
                seq.append(token)
            running = [seq for seq in running if not seq.constraint.is_complete(seq.num_outputs)]  # type: ignore[union-attr]
            if not running:
                break
        return [seq.tokens[seq.num_prompt : seq.num_tokens].tolist() for seq in everyone]

    said = answers(NativeMatcher)
    assert said == answers(Unasked)
    assert len(set(map(tuple, said))) > 1


def test_native_code_draws_what_a_grammar_allows_as_often_as_it_is_likely(
    native: NativeTokenizer, vocabulary: Vocabulary, model: Model
) -> None:
    vocab_size, rows = model.checkpoint.vocab_size, 2000
    first = native.matcher(grammars.described(Grammar("regex", "[a-f]x")), grammars.LIMITS)
    allowed = np.unpackbits(np.frombuffer(first.compute_bitmask(), np.uint8), bitorder="little")[:vocab_size] > 0
    logits = np.where(allowed, np.linspace(0, 2, vocab_size), 1).astype(np.float32)
    masks, sequences = Masks(rows, vocab_size), []
    for row in range(rows):
        seq = sequence([1], [], row, seed=row, temperature=0.7)
        seq.slot, seq.constraint = row, Constraint(first.deep_copy())
        sequences.append(seq)
    masks.begin(sequences, may_ask=True)
    found = Sampler(0, masks).sample(torch.from_numpy(logits).repeat(rows, 1), sequences)
    weights = np.where(allowed, np.exp(logits / 0.7), 0)
    shares = np.bincount(found.token_ids, minlength=vocab_size) / rows
    assert not found.failed and 3 < allowed.sum() < 30
    assert np.abs(shares - weights / weights.sum()).max() < 0.04


def test_what_is_no_grammar_and_tokens_that_do_not_fit_are_errors(native: NativeTokenizer) -> None:
    bad = native.matcher(grammars.described(Grammar("lark", "start: (")), grammars.LIMITS)
    assert bad.is_error() and bad.get_error()
    good = native.matcher(grammars.described(GRAMMARS[1]), grammars.LIMITS)
    assert good.get_error() == ""
    assert not good.consume_token(0)
    assert good.is_error() and good.is_stopped()


def test_sentencepiece_tokens_have_their_spaces(tmp_path: Path) -> None:
    own = Tokenizer.from_folder(tiny_tokenizers.write(tmp_path, tiny_tokenizers.sentencepiece(), eos_token="</s>"))
    vocabulary = own.vocabulary([id_of(own, "</s>")])
    assert vocabulary is not None
    made, speller = opened(vocabulary, own.vocab_size)
    plain = grammars.open_tokenizer(vocabulary, own.vocab_size)
    text = grammars.described(Grammar("regex", "(one of these|one of those) [a-z ]{3,9}"), vocabulary.lead)
    for seed in range(4):
        walk(made.matcher(text, grammars.LIMITS), LLMatcher(plain, text), seed)
    speller.close()


def answers(model: Model, vocabulary: Vocabulary, lose_after: int = 0) -> tuple[list[Result], Any]:
    """After so many requests the process is lost."""
    made = bench(model)
    held = made.core._grammars
    held.vocabulary = vocabulary
    asked = [
        request(random_prompt(seed, 20), 60, grammar=GRAMMARS[seed % 3], seed=seed, temperature=1, stop_token_ids=())
        for seed in range(6)
    ]
    results = made.run(*asked[:lose_after])
    if lose_after:
        assert held._speller is not None
        held._speller._process.kill()
    results += made.run(*asked[lose_after:])
    held.close()
    return results, held._tokenizer


def test_large_vocabularies_go_through_it_and_answers_are_the_same(
    model: Model, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, kind = answers(model, vocabulary)
    assert isinstance(kind, LLTokenizer)
    monkeypatch.setattr(grammars, "SMALL_VOCABULARY", 0)
    for lose_after in (0, 1):
        large, kind = answers(model, vocabulary, lose_after)
        assert isinstance(kind, NativeTokenizer)
        assert tokens_of(large) == tokens_of(small)


@pytest.mark.parametrize("missing", ["interface", "process"])
def test_where_it_cannot_be_had_the_engine_opens_the_tokenizer(
    model: Model,
    vocabulary: Vocabulary,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(grammars, "SMALL_VOCABULARY", 0)
    if missing == "interface":
        monkeypatch.setattr(grammars, "library", lambda: None)
    else:
        monkeypatch.setattr("sys.executable", "/bin/true")
    results, kind = answers(model, vocabulary)
    assert isinstance(kind, LLTokenizer)
    assert not any(result.error for result in results)
    assert [record.levelno for record in caplog.records if "answers wait" in record.getMessage()] == [logging.WARNING]


def test_every_version_that_may_be_installed_is_known() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert "llguidance>=1.9,<1.10" in project["dependencies"]
    assert matchers.VERSIONS == ("1.9",)


def test_the_process_yields_to_streams(vocabulary: Vocabulary, model: Model) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    _, speller = opened(vocabulary, model.checkpoint.vocab_size)
    assert os.getpriority(os.PRIO_PROCESS, speller.pid) == min(own + NICENESS, 19)
    if sys.platform == "linux":
        assert Path(f"/proc/{speller.pid}/oom_score_adj").read_text().strip() == ENDED_FIRST
    speller.close()
