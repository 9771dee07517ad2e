"""A model of random weights under random schemas and regexes: every answer fits, or was cut where it may be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support import random_forms
from support.engine_harness import Bench, Result, bench, random_prompt, request

from sensorium.engine.grammars import described, open_tokenizer
from sensorium.models.base import Model
from sensorium.prompt.forms import Form
from sensorium.prompt.grammar_check import FormRefused, Names, checked
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Grammar

TOKENS = 120


@pytest.fixture(scope="module")
def tokenizer(folder: Path, model: Model) -> Tokenizer:
    return Tokenizer.from_folder(folder, vocab_size=model.checkpoint.vocab_size)


def answers(model: Model, tokenizer: Tokenizer, held: list[Grammar]) -> list[Result]:
    made: Bench = bench(model, max_num_seqs=16, kv_tokens=8192)
    made.core._grammars.vocabulary = tokenizer.vocabulary(model.checkpoint.stop_token_ids)
    stops = model.checkpoint.stop_token_ids
    return made.run(
        *[
            request(
                random_prompt(seed, 8), TOKENS, grammar=one, seed=seed, temperature=seed % 3 / 2, stop_token_ids=stops
            )
            for seed, one in enumerate(held)
        ]
    )


def may_end_here(tokenizer: Tokenizer, model: Model, grammar: Grammar, tokens: list[int]) -> bool:
    from llguidance import LLMatcher

    vocabulary = tokenizer.vocabulary(model.checkpoint.stop_token_ids)
    assert vocabulary is not None
    library = open_tokenizer(vocabulary, model.checkpoint.vocab_size)
    return LLMatcher(library, described(grammar)).try_consume_tokens(tokens) == len(tokens)


def run_schemas(model: Model, tokenizer: Tokenizer, count: int, seed: int) -> Counter[str]:
    """How many answers were whole, cut or never begun, as their schema was refused."""
    random = Random(seed)
    schemas: list[Any] = []
    held: list[Grammar] = []
    found: Counter[str] = Counter()
    while len(schemas) < count:
        schema = random_forms.schema(random)
        whitespace = random.choice(["", "[ ]?"])
        try:
            kind, source = checked(Form("json", json.dumps(schema), "", whitespace), Names())
        except FormRefused as error:
            found["refused"] += 1
            assert "too complex" in error.reason or "fulfilled" in error.reason, (schema, error.reason)
            continue
        schemas.append(schema)
        held.append(Grammar(kind, source))  # type: ignore[arg-type]
    for schema, grammar, result in zip(schemas, held, answers(model, tokenizer, held), strict=True):
        assert not result.error, schema
        found[result.reason or "?"] += 1
        if result.reason == "stop":
            text = tokenizer.decode(result.tokens)
            assert random_forms.fits(json.loads(text), schema, schema), (schema, text)
        else:
            assert may_end_here(tokenizer, model, grammar, result.tokens), schema
    return found


def run_regexes(model: Model, tokenizer: Tokenizer, count: int, seed: int) -> Counter[str]:
    random = Random(seed)
    regexes = [random_forms.regex(random) for _ in range(count)]
    held = [Grammar(*checked(Form("regex", regex, ""), Names())) for regex in regexes]  # type: ignore[arg-type]
    found: Counter[str] = Counter()
    for regex, grammar, result in zip(regexes, held, answers(model, tokenizer, held), strict=True):
        assert not result.error, regex
        found[result.reason or "?"] += 1
        if result.reason == "stop":
            text = tokenizer.decode(result.tokens)
            assert re.fullmatch(regex, text), (regex, text)
        else:
            assert may_end_here(tokenizer, model, grammar, result.tokens), regex
    return found


def test_random_schemas(model: Model, tokenizer: Tokenizer) -> None:
    found = run_schemas(model, tokenizer, 40, 1)
    assert found["stop"] > 15
    assert found["refused"] < 10


def test_random_regexes(model: Model, tokenizer: Tokenizer) -> None:
    assert run_regexes(model, tokenizer, 20, 1)["stop"] > 5


def test_the_check_of_answers_finds_what_does_not_fit() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}
    assert random_forms.fits({"a": 3, "b": None}, schema, schema)
    wrong: list[Any] = [{}, {"a": 2}, {"a": 3.5}, {"a": True}, [], None]
    for value in wrong:
        assert not random_forms.fits(value, schema, schema)
