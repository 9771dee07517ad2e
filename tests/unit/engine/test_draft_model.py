"""A draft model: answers are those that come without, whatever it guesses; and it rests where it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints
from support.engine_harness import Bench, Replayed, bench, image_request, random_prompt, request, tokens_of

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine.drafting import Drafting
from sensorium.engine.faults import Faults
from sensorium.engine.lookup import StepTimes
from sensorium.errors import StartupError
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, Grammar


class SlowSteps(StepTimes):
    """Steps of the model take so long that guesses always pay."""

    def observe(self, rows: int, seconds: float, *, drafted: bool) -> None:
        pass

    def plain(self, sequences: int) -> float | None:
        return 1e6


def loaded(folder: Any, make: Callable[..., Any], **options: Any) -> Model:
    make(folder, **options)
    return load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def drafts(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The same weights; others; others of a smaller shape, which attend through a window."""
    folder = tmp_path_factory.mktemp("drafts")
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "seed": 5}
    return {
        "same": model,
        "other": loaded(folder / "other", checkpoints.make_qwen2, seed=3),
        "small": loaded(folder / "small", checkpoints.make_mistral, **small),
    }


def drafting_of(engine: Bench) -> Drafting:
    found = engine.engine.drafting
    assert found is not None
    return found


def guessed(model: Model, draft: Model, *, speculative_tokens: int = 4, **options: Any) -> Bench:
    """An engine whose draft model is always asked."""
    engine = bench(model, draft=draft, speculative_tokens=speculative_tokens, **options)
    drafting = drafting_of(engine)
    drafting.times, drafting._clock = SlowSteps(), lambda: 0.0
    return engine


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 1},
    {
        "temperature": 0.7,
        "seed": 2,
        "logprobs": 1,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.1,
        "min_tokens": 9,
    },
]


def chats(stop: int | None = None, **sampling: Any) -> list[EngineRequest]:
    if stop is not None:
        sampling["stop_token_ids"] = (stop,)
    texts = [request(random_prompt(i, 3 + 9 * i), 16, **sampling) for i in range(5)]
    picture = image_request(2, 20)
    assert picture.sampling is not None
    return [*texts, replace(picture, sampling=replace(picture.sampling, **sampling))]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["same", "other", "small"])
def test_the_same_answers_as_without(
    model: Model, drafts: dict[str, Model], kind: str, sampling: dict[str, Any]
) -> None:
    """With short chunks, preemption, a cached prefix, stop tokens and a picture; look-up guesses first."""
    stop = bench(model).run(*chats(**sampling))[2].tokens[9]
    expected = bench(model).run(*chats(stop, **sampling))
    engine = guessed(model, drafts[kind], max_num_batched_tokens=23)
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        if step % 5 == 4 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for _ in ("cold", "warm"):
        got = engine.run(*chats(stop, **sampling), before_step=preempt)
        assert [(one.tokens, one.reason) for one in got] == [(one.tokens, one.reason) for one in expected]
        for mine, reference in zip(got, expected, strict=True):
            assert [one.logprob for one in mine.logprobs] == pytest.approx(
                [one.logprob for one in reference.logprobs], abs=1e-4
            )
    assert scheduler.preemptions > 0
    assert drafting_of(engine).num_draft_tokens > 10


@pytest.fixture
def no_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensorium.engine.lookup.last_match", lambda seq: None)


@pytest.mark.usefixtures("no_lookup")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_model_with_the_same_logits_is_always_right(model: Model, sampling: dict[str, Any]) -> None:
    """It draws as the request does, and penalties count what it says and take it back."""
    engine = guessed(model, model, kv_tokens=2048)
    steps = [engine.core._steps]
    for _ in ("cold", "warm"):
        engine.run(*(request(random_prompt(i, 5 + 30 * i), 40, **sampling) for i in range(4)))
        steps.append(engine.core._steps)
    drafting = drafting_of(engine)
    assert drafting.num_accepted_tokens == drafting.num_draft_tokens > 200
    assert max(np.diff(steps)) < 20


@pytest.mark.usefixtures("no_lookup")
def test_wrong_guesses_are_made_anew_from_what_was_said(model: Model, drafts: dict[str, Model]) -> None:
    """Each guess is what the draft model says alone after the same tokens, whatever was guessed before."""
    engine, other = guessed(model, drafts["other"]), drafts["other"]
    drafting = drafting_of(engine)
    made: list[tuple[list[int], list[int]]] = []
    take = drafting._take

    def spy(ready: Any, guesses: dict[int, list[int]]) -> None:
        made.extend((seq.tokens[: seq.num_tokens].tolist(), guesses[seq.id]) for seq in ready)
        take(ready, guesses)

    drafting._take = spy  # type: ignore[method-assign]
    engine.run(*(request(random_prompt(i, 5 + 9 * i), 40) for i in range(3)))
    assert len(made) > 15
    assert drafting.num_accepted_tokens < 0.2 * drafting.num_draft_tokens
    alone = bench(other).run(*(request(tokens, len(guess)) for tokens, guess in made))
    assert tokens_of(alone) == [guess for _, guess in made]


@pytest.mark.usefixtures("no_lookup")
def test_a_long_prompt_is_followed_in_parts_and_found_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensorium.engine.drafting.CATCH_UP_TOKENS", 48)
    engine = guessed(model, model, max_model_len=512)
    followed = drafting_of(engine)._model
    assert followed is not None
    computed: list[int] = []
    forward = followed._forward

    def spy(batch: Any) -> Any:
        computed.append(len(batch.inputs.token_ids))
        return forward(batch)

    monkeypatch.setattr(followed, "_forward", spy)
    asked = [request(random_prompt(1, 300), 40) for _ in range(2)]
    expected = bench(model).run(request(random_prompt(1, 300), 40))
    assert tokens_of(engine.run(asked[0])) == tokens_of(expected)
    assert computed[:6] == [48] * 6
    computed.clear()
    assert tokens_of(engine.run(asked[1])) == tokens_of(expected)
    assert max(computed) < 20
    assert drafting_of(engine).num_accepted_tokens == drafting_of(engine).num_draft_tokens > 40


@pytest.mark.parametrize("options", [{"kv_tokens": 160}, {"capture": Replayed()}, {"max_num_seqs": 2}])
def test_whatever_else_happens(model: Model, drafts: dict[str, Model], options: dict[str, Any]) -> None:
    """Few blocks, of which the draft model has fewer still; graphs of decodes; a queue."""
    asked = [[request(random_prompt(i, 3 + 14 * i), 60) for i in range(4)] for _ in range(2)]
    engine = guessed(model, drafts["small"], **options)
    pool = engine.engine.scheduler.prefixes.pool
    assert tokens_of(engine.run(*asked[0])) == tokens_of(bench(model).run(*asked[1]))
    assert (engine.engine.scheduler.preemptions > 0) == (pool.num_blocks < 20)
    assert drafting_of(engine).num_drafts > 10


def test_answers_of_a_form_have_only_the_drafts_that_are_forced(model: Model, folder: Path) -> None:
    vocabulary = Tokenizer.from_folder(folder, vocab_size=model.checkpoint.vocab_size).vocabulary((2,))
    answers = []
    for engine in (bench(model), guessed(model, model)):
        engine.core._grammars.vocabulary = vocabulary
        form = Grammar("regex", "(the same beginning|the same end), [a-z]{4,9}")
        held = [request(random_prompt(i, 20), 30, grammar=form, seed=i, temperature=i % 2) for i in range(4)]
        answers.append(tokens_of(engine.run(*held, *chats(temperature=0.5, seed=1))))
    assert answers[0] == answers[1]
    assert drafting_of(engine).num_draft_tokens > 20


@pytest.mark.usefixtures("no_lookup")
@pytest.mark.parametrize("kind", ["same", "other"])
def test_what_is_drawn_has_the_distribution_of_the_model(model: Model, drafts: dict[str, Model], kind: str) -> None:
    """Pairs of tokens, of which the second may be a draft: Pearson's test against the model's probabilities, at a
    level that one of ten thousand sets of seeds fails."""
    prompt, count = random_prompt(3, 8), 700

    def chances(tokens: list[int]) -> dict[int, float]:
        [found] = bench(model).run(request(tokens, 1, logprobs=4))
        weights = {token: np.exp(logprob / 1.3) for token, logprob in found.logprobs[0].top}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    first = chances([*prompt, 77])
    expected = {(a, b): p * q * count for a, p in first.items() for b, q in chances([*prompt, 77, a]).items()}
    engine = guessed(model, drafts[kind], max_num_seqs=64, kv_tokens=8192, max_model_len=64)
    asked = [request([*prompt, 77], 3, seed=seed, temperature=1.3, top_k=4) for seed in range(count)]
    drawn = Counter((one.tokens[0], one.tokens[1]) for one in engine.run(*asked))
    assert drawn.keys() <= expected.keys()
    statistic = sum((drawn[pair] - mean) ** 2 / mean for pair, mean in expected.items())
    assert statistic < 44.3  # chi-squared of fifteen degrees of freedom
    assert drafting_of(engine).num_drafts > 0.2 * count


# When it rests


class Timed(SlowSteps):
    """Steps of a second, however many drafts there are."""

    def plain(self, sequences: int) -> float | None:
        return 1.0

    def ratio(self, sequences: int, rows: int) -> float:
        return 1.0


def timed(model: Model, draft: Model, round_s: float) -> tuple[Bench, list[float]]:
    """A round of the draft model takes so many seconds, by the clock that is returned."""
    engine, now = guessed(model, draft), [0.0]
    drafting = drafting_of(engine)
    drafting.times, drafting._clock = Timed(), lambda: now[0]
    followed = drafting._model
    assert followed is not None
    forward = followed._forward

    def slow(batch: Any) -> Any:
        now[0] += round_s
        return forward(batch)

    followed._forward = slow  # type: ignore[method-assign]
    return engine, now


@pytest.mark.usefixtures("no_lookup")
def test_guesses_that_are_wrong_or_slow_cost_little(model: Model, drafts: dict[str, Model]) -> None:
    """Of 400 steps of a second those that find out how bad it is."""
    for draft, round_s in ((drafts["other"], 0.25), (model, 1.5)):
        engine, now = timed(model, draft, round_s)
        engine.run(*(request(random_prompt(i, 9), 100) for i in range(4)))
        assert 0 < now[0] < 12


@pytest.mark.usefixtures("no_lookup")
def test_guesses_that_are_right_go_on(model: Model) -> None:
    engine, now = timed(model, model, 0.25)
    engine.run(request(random_prompt(1, 9), 200))
    drafting = drafting_of(engine)
    assert drafting.num_accepted_tokens > 120
    assert engine.core._steps + now[0] < 150  # of 200 seconds
    assert drafting.account.steps > 50


@pytest.mark.usefixtures("no_lookup")
def test_a_prompt_that_takes_longer_than_its_answer_gains_is_not_followed(model: Model) -> None:
    engine, now = timed(model, model, 0.25)
    drafting = drafting_of(engine)
    drafting.account.steps, drafting._token_s = 5.0, 0.2  # no trials; 60 seconds for a prompt of 300 tokens
    engine.run(request(random_prompt(1, 300), 40))
    assert now == [0.0]
    engine.run(request(random_prompt(1, 20), 40))
    assert drafting.num_accepted_tokens > 20


def test_a_draft_model_that_fails_is_not_asked_again(model: Model) -> None:
    expected = tokens_of(bench(model).run(*chats()))
    engine = guessed(model, model, faults=Faults("draft:raise:3"))
    assert tokens_of(engine.run(*chats())) == expected
    assert drafting_of(engine)._model is None
    assert tokens_of(engine.run(*chats())) == expected


def test_an_aborted_request_leaves_nothing(model: Model) -> None:
    engine = guessed(model, model)
    engine.add(request(random_prompt(1, 9), 100), image_request(3, 100))
    for _ in range(9):
        engine.step()
    for request_id in list(engine.results):
        engine.engine.scheduler.abort(request_id)
    engine.check_clean()


@pytest.mark.parametrize(("make", "said"), [(checkpoints.make_lfm2, "cannot guess"), (None, "keep states")])
def test_models_with_states_have_none_and_are_none(
    model: Model, tmp_path: Path, make: Callable[..., Any] | None, said: str
) -> None:
    """A wrong guess would change what they keep."""
    hybrid = loaded(tmp_path, checkpoints.make_lfm2)
    pair = (model, hybrid) if make is not None else (hybrid, model)
    with pytest.raises(StartupError, match=said):
        bench(pair[0], draft=pair[1], speculative_tokens=4)
