"""Answers held to a grammar: always of its form, whatever else a request asks for, and nobody else notices."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits
from support import tiny_tokenizers
from support.engine_harness import Bench, Result, bench, random_prompt, request, tokens_of
from support.tiny_tokenizers import id_of

from sensorium.engine import grammars
from sensorium.errors import GRAMMAR_FAILED, GRAMMAR_NOT_COMPILED
from sensorium.models.base import Model
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, Grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = Grammar("json", json.dumps(PERSON))


@pytest.fixture(scope="module")
def tokenizer(folder: Path, model: Model) -> Tokenizer:
    return Tokenizer.from_folder(folder, vocab_size=model.checkpoint.vocab_size)


def held(model: Model, tokenizer: Tokenizer, **options: Any) -> Bench:
    made = bench(model, **options)
    made.core._grammars.vocabulary = tokenizer.vocabulary(model.checkpoint.stop_token_ids)
    return made


def ask(model: Model, grammar: Grammar | None, seed: int = 0, max_tokens: int = 120, **sampling: Any) -> EngineRequest:
    sampling.setdefault("stop_token_ids", model.checkpoint.stop_token_ids)
    return request(random_prompt(seed, 20), max_tokens, grammar=grammar, seed=seed, **sampling)


def text_of(tokenizer: Tokenizer, result: Result) -> str:
    return tokenizer.decode(result.tokens)


def check_person(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "colours"]
    assert len(found["name"]) <= 8
    assert 0 <= found["age"] <= 150
    assert set(found["colours"]) <= {"red", "green", "blue"}


def test_every_answer_has_the_form_and_others_are_as_without(model: Model, tokenizer: Tokenizer) -> None:
    free = [ask(model, None, seed, 20, temperature=seed % 2) for seed in range(4)]
    alone = tokens_of(held(model, tokenizer).run(*free))
    mixed = held(model, tokenizer, speculative_tokens=16)
    people = [ask(model, JSON, seed, temperature=seed % 3 / 2) for seed in range(6)]
    short = [ask(model, Grammar("regex", "[ab]{2,3}c?"), seed, temperature=1) for seed in range(6)]
    again = [ask(model, None, seed, 20, temperature=seed % 2) for seed in range(4)]
    results = mixed.run(*people, *again, *short)
    for result in results[:6]:
        assert result.reason == "stop"
        check_person(text_of(tokenizer, result))
    assert tokens_of(results[6:10]) == alone
    assert all(re.fullmatch("[ab]{2,3}c?", text_of(tokenizer, result)) for result in results[10:])


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("grammar", [JSON, Grammar("regex", "(the same beginning|the same end), [0-9]{3} times")])
def test_forced_tokens_come_in_one_step_and_change_nothing(
    model: Model, tokenizer: Tokenizer, grammar: Grammar, temperature: float
) -> None:
    one_by_one, together = held(model, tokenizer), held(model, tokenizer)
    one_by_one.engine.scheduler.propose = lambda seq, most: []
    steps = []
    answers = []
    for made in (one_by_one, together):
        asked = [ask(model, grammar, seed, temperature=temperature, logprobs=2) for seed in range(3)]
        answers.append(made.run(*asked))
        steps.append(made.core._steps)
    assert tokens_of(answers[0]) == tokens_of(answers[1])
    assert steps[1] < 0.8 * steps[0]
    for plain, drafted in zip(*answers, strict=True):
        assert [one.token_id for one in drafted.logprobs] == drafted.tokens
        assert np.allclose(
            [one.logprob for one in plain.logprobs], [one.logprob for one in drafted.logprobs], atol=1e-3
        )


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "frequency_penalty": 1.0}, {"temperature": 1.0}])
def test_forced_tokens_are_not_sampled(model: Model, tokenizer: Tokenizer, sampling: dict[str, Any]) -> None:
    """Nor are their logits computed; who does not ask for log-probabilities has the same tokens as who does."""
    asked = held(model, tokenizer).run(*(ask(model, JSON, seed, logprobs=0, **sampling) for seed in range(3)))
    made = held(model, tokenizer)
    sampler = made.engine.runner._sampler
    sample, rows = sampler.sample, []

    def spy(logits: Any, sequences: Any, ahead: Any = ()) -> Any:
        rows.append((len(logits), len(sequences)))
        return sample(logits, sequences, ahead)

    sampler.sample = spy  # type: ignore[method-assign]
    results = made.run(*(ask(model, JSON, seed, **sampling) for seed in range(3)), ask(model, None, 3, 10))
    assert tokens_of(results[:3]) == tokens_of(asked)
    assert len(rows) == made.core._steps
    assert all(num_rows == num_sequences for num_rows, num_sequences in rows)
    assert sum(num_rows for num_rows, _ in rows) < 0.8 * sum(map(len, tokens_of(results)))


def test_an_answer_that_is_whole_ends_at_once_and_names_no_stop_token(model: Model, tokenizer: Tokenizer) -> None:
    (result,) = held(model, tokenizer).run(ask(model, Grammar("regex", "yes|no")))
    assert (result.reason, text_of(tokenizer, result)) in (("stop", "yes"), ("stop", "no"))
    assert not set(result.tokens) & set(model.checkpoint.stop_token_ids)


@pytest.mark.parametrize(
    "asked",
    [
        {"min_tokens": 50},
        {"stop_token_ids": ()},
        {"bad_words": "a"},
        {"logit_bias": "a"},
        {"allowed_token_ids": (7,)},
        {"repetition_penalty": 100.0, "presence_penalty": 2.0},
        {"top_k": 1, "temperature": 1.0},
        {"min_p": 1.0, "temperature": 1.0},
    ],
    ids=str,
)
def test_nothing_else_that_is_asked_for_leaves_the_form(
    model: Model, tokenizer: Tokenizer, asked: dict[str, Any]
) -> None:
    a = tokenizer.token_to_id("a")
    if "bad_words" in asked:
        asked = {"bad_words": ((a,),)}
    if "logit_bias" in asked:
        asked = {"logit_bias": ((a, -100.0),)}
    (result,) = held(model, tokenizer).run(ask(model, Grammar("regex", "a{3}b?"), **asked))
    assert result.reason == "stop"
    assert text_of(tokenizer, result) in ("aaa", "aaab")


def test_without_end_tokens_an_answer_goes_on_as_long_as_it_can(model: Model, tokenizer: Tokenizer) -> None:
    asked = [ask(model, Grammar("regex", "a{1,9}"), seed, temperature=1, stop_token_ids=()) for seed in range(3)]
    results = held(model, tokenizer).run(*asked)
    assert [text_of(tokenizer, result) for result in results] == ["a" * 9] * 3


def test_max_tokens_cuts(model: Model, tokenizer: Tokenizer) -> None:
    (result,) = held(model, tokenizer).run(ask(model, JSON, max_tokens=5))
    assert (result.reason, len(result.tokens)) == ("length", 5)
    assert text_of(tokenizer, result).startswith('{"na')


def test_preempted_answers_go_on_as_they_began(model: Model, tokenizer: Tokenizer) -> None:
    roomy, tight = held(model, tokenizer), held(model, tokenizer, kv_tokens=192, max_model_len=160)
    alone = tokens_of(roomy.run(*[ask(model, JSON, seed, temperature=1) for seed in range(5)]))
    again = tokens_of(tight.run(*[ask(model, JSON, seed, temperature=1) for seed in range(5)]))
    assert tight.engine.scheduler.preemptions
    assert again == alone


def test_a_step_that_fails_is_repeated_with_the_same_tokens(model: Model, tokenizer: Tokenizer) -> None:
    """What the sampler had taken before the step failed is what is sampled again."""
    made = held(model, tokenizer)
    sampler = made.engine.runner._sampler
    original, calls = sampler.sample, []

    def failing(*args: Any) -> Any:
        found = original(*args)
        calls.append(1)
        if len(calls) in (3, 6):
            raise RuntimeError("a fault behind the sampler")
        return found

    sampler.sample = failing  # type: ignore[method-assign, assignment]
    made.core._failed_shapes.update({(n,) for n in range(9)})  # as if it had failed before: each is tried alone
    made.engine.scheduler.propose = lambda seq, most: []
    results = made.run(*[ask(model, JSON, seed, temperature=1) for seed in range(2)])
    for result in results:
        assert result.reason == "stop"
        check_person(text_of(tokenizer, result))


def test_a_grammar_that_fails_on_the_way_ends_its_request_only(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(max_items_in_row=80, verbose_errors=False))
    made = held(model, tokenizer)
    hostile = ask(
        model, Grammar("lark", 'start: s "b"\ns: s s | s s s | "a" |'), max_tokens=200, logit_bias=((64, 90.0),)
    )
    failed, fine = made.run(hostile, ask(model, JSON, temperature=1))
    assert (failed.reason, failed.error) == ("error", GRAMMAR_FAILED)
    check_person(text_of(tokenizer, fine))
    (after,) = made.run(ask(model, JSON, 1))
    check_person(text_of(tokenizer, after))


@pytest.mark.parametrize("source", ['start: start "a"', "start: (", 'start: missing "a"'])
def test_what_cannot_be_compiled_is_an_error_of_its_request(model: Model, tokenizer: Tokenizer, source: str) -> None:
    bad, good = held(model, tokenizer).run(ask(model, Grammar("lark", source)), ask(model, JSON, temperature=1))
    assert (bad.reason, bad.error, bad.tokens) == ("error", GRAMMAR_NOT_COMPILED, [])
    check_person(text_of(tokenizer, good))


def test_without_a_vocabulary_there_are_no_grammars(model: Model) -> None:
    (result,) = bench(model).run(ask(model, JSON))
    assert (result.reason, result.error) == ("error", grammars.NO_VOCABULARY)


def test_a_request_that_leaves_while_its_grammar_is_compiled_is_gone(model: Model, tokenizer: Tokenizer) -> None:
    made = held(model, tokenizer)
    asked = ask(model, JSON)
    made.add(asked)
    assert made.core.has_work()
    made.core._grammars.abort(asked.id)
    assert not made.core.has_work()
    (other,) = made.run(ask(model, JSON, 1))
    assert made.results[asked.id].tokens == []
    check_person(text_of(tokenizer, other))


def test_a_grammar_is_compiled_once_and_few_are_kept(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = held(model, tokenizer)
    monkeypatch.setattr(grammars, "MAX_KEPT", 3)
    compiled = []

    def counted(*args: Any, **named: Any) -> LLMatcher:
        compiled.append(1)
        return LLMatcher(*args, **named)

    monkeypatch.setattr(grammars, "LLMatcher", counted)
    made.run(*[ask(model, JSON, seed, temperature=1) for seed in range(4)])
    assert len(compiled) == 1
    made.run(*[ask(model, Grammar("regex", f"a{number}")) for number in range(9)])
    assert len(made.core._grammars._kept) == 3
    made.run(ask(model, JSON))
    assert len(compiled) == 11
    made.run(*[replace(ask(model, JSON), salt=b"another tenant's") for _ in range(2)])
    assert len(compiled) == 12


def test_a_request_whose_grammar_is_kept_waits_for_no_thread(model: Model, tokenizer: Tokenizer) -> None:
    made = held(model, tokenizer)
    asked = [ask(model, JSON, temperature=1), ask(model, Grammar("lark", "start: ("))]
    good, bad = made.run(*asked)
    made.core._grammars._thread.shutdown()
    again = made.run(*(replace(one, id=one.id + 10**6) for one in asked))
    assert good.tokens and bad.error
    assert [(one.tokens, one.error) for one in again] == [(good.tokens, ""), ([], bad.error)]


def test_control_tokens_are_never_text(model: Model, tokenizer: Tokenizer) -> None:
    """Also those that a tokenizer does not flag as special."""
    asked = [ask(model, Grammar("regex", r"(.|\n)*"), seed, 60, temperature=1, stop_token_ids=()) for seed in range(4)]
    results = held(model, tokenizer).run(*asked)
    vocabulary = tokenizer.vocabulary(())
    assert vocabulary is not None
    control = {token for token, _, is_control in vocabulary.added if is_control}
    assert control and not control & {token for result in results for token in result.tokens}


def test_a_decoder_that_takes_a_space_gets_one(tmp_path: Path) -> None:
    """Of SentencePiece's kind: the first token of an answer usually brings a space that nobody sees."""
    own = Tokenizer.from_folder(tiny_tokenizers.write(tmp_path, tiny_tokenizers.sentencepiece(), eos_token="</s>"))
    vocabulary = own.vocabulary([id_of(own, "</s>")])
    assert vocabulary is not None and vocabulary.lead == 1
    library = grammars.open_tokenizer(vocabulary, own.vocab_size)
    matcher = LLMatcher(library, grammars.described(Grammar("regex", "[a-z]{3}"), vocabulary.lead))
    assert matcher.validate_tokens([id_of(own, "▁"), id_of(own, "t")]) == 2
    assert matcher.validate_tokens([id_of(own, "t"), id_of(own, "h")]) == 2
    assert matcher.validate_tokens([id_of(own, "▁")] * 2) == 1
