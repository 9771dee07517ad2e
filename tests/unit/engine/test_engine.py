"""The engine's promises on a real (tiny) model: what comes out does not depend on how it was computed."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_llama, make_qwen3_vl_moe
from support.engine_harness import Bench, Result, bench, image_request, random_prompt, request, tokens_of
from torch import Tensor

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine.encoding import encode_alone
from sensorium.engine.faults import Faults
from sensorium.engine.loop import MEDIA_FAILED, NOT_FINITE, STEP_FAILED
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.pooling.pooler import EmbedPooler, VectorsPooler
from sensorium.types import EngineRequest, MediaFeatures, PoolingParams

LENGTHS = (3, 17, 32, 33, 64, 70, 100, 5)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny Qwen3-VL with experts and Qwen2-VL's patches."""
    folder = tmp_path_factory.mktemp("qwen3_vl_moe")
    make_qwen3_vl_moe(folder, text={"max_position_embeddings": 2048}, vision={"patch_size": 14})
    return load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")


def texts(max_tokens: int = 12, **sampling: Any) -> list[EngineRequest]:
    return [request(random_prompt(i, length), max_tokens, **sampling) for i, length in enumerate(LENGTHS)]


def mixed(max_tokens: int = 12, **sampling: Any) -> list[EngineRequest]:
    """Half text, half pictures; two of these are of the same size, one request has two."""
    return [
        *texts(max_tokens, **sampling)[:4],
        *(image_request(i, max_tokens, **sampling) for i in range(2)),
        image_request(7, max_tokens, grid=(4, 20), before=2, after=1, **sampling),
        image_request(8, max_tokens, grid=(8, 8), images=2, **sampling),
    ]


def solo(model: Model, requests: Sequence[EngineRequest], **options: Any) -> list[Result]:
    """Each request in an engine of its own, prompt in one piece."""
    return [bench(model, **options).run(replace(one, id=one.id + 1_000_000))[0] for one in requests]


@pytest.mark.parametrize(
    ("chunk", "caching", "preempted", "cache"),
    [
        *itertools.product([2048, 13], [True, False], [True, False], ["auto"]),
        (2048, True, True, "int8"),
        (13, True, False, "int8"),
        (13, False, True, "int8"),
    ],
)
def test_same_tokens_however_computed(model: Model, chunk: int, caching: bool, preempted: bool, cache: str) -> None:
    """R7: chunked or not, cache cold and warm, preempted or not, alone or in a batch of 8, text and pictures."""
    check_same_tokens(model, chunk, caching, preempted, cache)


def test_rows_for_inner_layers_however_computed(deep_model: Model) -> None:
    """Deepstack: what the tower has for the decoder's first layers is there for every token that is computed. And
    experts: a token's do not depend on who else is in the step."""
    check_same_tokens(deep_model, 13, caching=True, preempted=True, cache="auto")


def test_rows_for_inner_layers_are_counted(deep_model: Model) -> None:
    engine = bench(deep_model)
    engine.run(image_request(1, 2, grid=(8, 8)))
    assert engine.engine.encoder.size_bytes == 16 * 3 * 64 * 4


def check_same_tokens(model: Model, chunk: int, caching: bool, preempted: bool, cache: str) -> None:
    engine = bench(model, max_num_batched_tokens=chunk, enable_prefix_caching=caching, kv_cache_dtype=cache)
    scheduler = engine.engine.scheduler
    requests = mixed(24, logprobs=2)
    expected = solo(model, requests, kv_cache_dtype=cache)
    near = 1e-5 if cache == "auto" else 1e-3  # keys that differ in their last bits may get another code

    def preempt(step: int) -> None:
        if preempted and step % 7 == 6 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for temperature in ("cold", "warm"):
        again = [replace(one, id=one.id + (temperature == "warm") * 10_000) for one in requests]
        got = engine.run(*again, before_step=preempt)
        assert tokens_of(got) == tokens_of(expected)
        for mine, reference in zip(got, expected, strict=True):
            for a, b in zip(mine.logprobs, reference.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=near)
                assert [token for token, _ in a.top] == [token for token, _ in b.top]
        if temperature == "warm" and caching:
            assert all(result.cached for result, length in zip(got, LENGTHS[:4], strict=False) if length > 16)
    assert (scheduler.preemptions > 0) == preempted


def test_cache_for_two_and_a_half_requests(model: Model) -> None:
    """R5: eight requests take turns."""
    requests = [request(random_prompt(i, 40), 60) for i in range(8)]
    engine = bench(model, kv_tokens=256)
    assert tokens_of(engine.run(*requests)) == tokens_of(solo(model, requests))
    assert engine.engine.scheduler.preemptions > 0


def test_prefill_cut_at_every_place_of_a_picture(model: Model) -> None:
    one = image_request(3, 6, before=3, after=2, grid=(6, 6))
    expected = tokens_of(solo(model, [one]))
    length = len(one.prompt.token_ids)
    for cut in range(1, length):
        engine = bench(model)
        engine.add(one)
        seq = engine.engine.scheduler.waiting[0]
        plan_chunk = engine.engine.scheduler._plan_chunk
        engine.engine.scheduler._plan_chunk = (  # type: ignore[method-assign]
            lambda plan, s, tokens, c=cut, f=plan_chunk: f(  # type: ignore[misc]
                plan, s, min(tokens, c - s.num_computed) if s.num_computed < c else tokens
            )
        )
        for _ in range(4):  # the text before the picture, the picture's rows, their part before the cut
            if seq.num_computed < cut:
                engine.step()
        assert seq.num_computed == cut
        while engine.engine.scheduler.has_work():
            engine.step()
        assert [engine.results[one.id].tokens] == expected
        engine.check_clean()


def test_pictures_of_one_size_share_nothing(model: Model) -> None:
    first, second = image_request(1, 12), image_request(1, 12, pixels_seed=2)
    assert np.array_equal(first.prompt.token_ids, second.prompt.token_ids)
    engine = bench(model)
    results = engine.run(first) + engine.run(second)
    assert tokens_of(results) == tokens_of(solo(model, [first, second]))
    assert results[0].tokens != results[1].tokens
    assert results[1].cached == 16  # the block of text before the picture
    assert engine.engine.encoder.hits == 0


def test_a_picture_that_comes_again_is_not_encoded_again(model: Model) -> None:
    engine = bench(model, enable_prefix_caching=False)
    calls = count_calls(model, engine)
    same = [image_request(1, 4), image_request(1, 4)]
    assert len({tuple(t) for t in tokens_of(engine.run(same[0]) + engine.run(same[1]))}) == 1
    assert calls == [1]
    assert (engine.engine.encoder.queries, engine.engine.encoder.hits) == (2, 1)


def count_calls(model: Model, engine: Bench) -> list[int]:
    calls: list[int] = []

    def counting(kind: Any, items: Sequence[MediaFeatures]) -> Any:
        calls.append(len(items))
        return encode_alone(model, torch.device("cpu"), kind, items)

    engine.engine.runner.encodings._encode = counting
    return calls


def test_conversation_reuses_prompt_picture_and_answer(model: Model) -> None:
    """The next turn finds everything computed before, generated tokens included, though they come as prompt now."""
    engine = bench(model)
    first = image_request(4, 30)
    [answer] = engine.run(first)
    prompt = first.prompt
    length = len(prompt.token_ids) + len(answer.tokens)
    tail = np.arange(len(prompt.token_ids), length + 5) + prompt.position_delta
    positions = prompt.positions
    assert positions is not None
    longer = replace(
        prompt,
        token_ids=np.concatenate((prompt.token_ids, answer.tokens, [50, 51, 52, 53, 54])).astype(np.int32),
        positions=np.concatenate((positions, tail[None].repeat(3, 0)), axis=1).astype(np.int32),
    )
    second = replace(first, id=first.id + 500_000, prompt=longer)
    expected = solo(model, [second])[0].tokens
    [got] = engine.run(second)
    assert got.tokens == expected
    assert got.cached == (length - 1) // 16 * 16


def test_equal_prompts_are_computed_once(model: Model) -> None:
    """n > 1: the others wait one step for the first and take its blocks."""
    engine = bench(model)
    prompt = random_prompt(1, 70)
    results = engine.run(*(request(prompt, 10) for _ in range(4)))
    assert [result.cached for result in results] == [0, 64, 64, 64]
    assert len({tuple(result.tokens) for result in results}) == 1


def test_tenants_do_not_share_prefixes_or_pictures(model: Model) -> None:
    """S75, both halves."""
    engine = bench(model)
    prompt = random_prompt(2, 70)
    engine.run(request(prompt, salt=b"a"))
    assert engine.run(request(prompt, salt=b"a"))[0].cached == 64
    assert engine.run(request(prompt, salt=b"b"))[0].cached == 0
    calls = count_calls(model, engine)
    for salt, encoded in ((b"a", [1]), (b"a", [1]), (b"b", [1, 1])):
        engine.run(replace(image_request(1), salt=salt))
        assert calls == encoded


# Seeds


def test_a_seed_decides_alone(model: Model) -> None:
    """R17: position in the batch, mates and preemption do not matter."""

    def seeded() -> EngineRequest:
        return request(random_prompt(1, 20), 20, temperature=1.0, top_p=0.9, seed=1234)

    expected = bench(model).run(seeded())[0].tokens
    rng = random.Random(0)
    for kv_tokens in (4096, 208):
        preemptions = 0
        for _ in range(6):
            mine = seeded()
            others = [
                request(random_prompt(rng.randrange(100), 30), 20, temperature=rng.choice((0, 0.7, 1.5)))
                for _ in range(7)
            ]
            place = rng.randrange(8)
            engine = bench(model, kv_tokens=kv_tokens)
            results = engine.run(*others[:place], mine, *others[place:])
            assert results[place].tokens == expected
            preemptions += engine.engine.scheduler.preemptions
        assert (preemptions > 0) == (kv_tokens == 208)


def test_unseeded_requests_differ(model: Model) -> None:
    prompt = random_prompt(1, 20)
    results = bench(model).run(*(request(prompt, 20, temperature=1.0) for _ in range(4)))
    assert len({tuple(result.tokens) for result in results}) == 4


# Ends


def test_length_stop_and_min_tokens(model: Model) -> None:
    prompt = random_prompt(3, 20)
    [free] = bench(model).run(request(prompt, 12))
    assert (free.reason, len(free.tokens)) == ("length", 12)
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    [stopped] = bench(model).run(request(prompt, 12, stop_token_ids=(stop,)))
    assert (stopped.reason, stopped.tokens) == ("stop", free.tokens[: first + 1])
    [longer] = bench(model).run(request(prompt, 12, stop_token_ids=(stop,), min_tokens=8))
    assert stop not in longer.tokens[:8]
    assert longer.tokens[:first] == free.tokens[:first]


@pytest.mark.parametrize(("length", "max_tokens"), [(300, 8), (250, 7), (0, 5), (3000, 1)])
def test_what_can_never_fit_is_refused(model: Model, length: int, max_tokens: int) -> None:
    """R6, S76: at once, with the numbers, and nothing else is disturbed."""
    engine = bench(model, kv_tokens=256)
    other = request(random_prompt(1, 20))
    refused, served = engine.run(request(random_prompt(1, length), max_tokens), other)
    assert refused.reason == "error"
    assert served.reason == "length"
    assert ("256" in refused.error) == (length > 0)


def test_what_just_fits_is_served(model: Model) -> None:
    [result] = bench(model, kv_tokens=256).run(request(random_prompt(1, 200), 56))
    assert (result.reason, len(result.tokens)) == ("length", 56)


def test_abort_at_any_time_gives_everything_back(model: Model) -> None:
    """R8: waiting, in the middle of a prompt, in the middle of a picture, decoding."""
    for steps in range(12):
        engine = bench(model, max_num_batched_tokens=16, kv_tokens=512)
        requests = [image_request(1, 8), request(random_prompt(1, 60), 8), image_request(2, 8)]
        engine.add(*requests)
        for _ in range(steps):
            engine.step()
        for one in requests:
            engine.engine.scheduler.abort(one.id)
        assert not engine.engine.scheduler.has_work()
        engine.check_clean()


# Failures


def test_a_failed_step_fails_its_requests_only(model: Model) -> None:
    """R1: the tenth step fails; what comes later is served."""
    engine = bench(model, faults=(faults := Faults("step:raise:10")))
    engine.engine.runner._faults = faults
    results = engine.run(*texts(16))
    assert {(r.reason, r.error) for r in results} == {("error", STEP_FAILED)}
    assert tokens_of(engine.run(*texts(6))) == tokens_of(solo(model, texts(6)))


def test_an_idle_engine_gives_back_memory_once_after_its_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rests = bench(model), []
    monkeypatch.setattr("sensorium.engine.loop.trim", lambda: rests.append("trim"))
    monkeypatch.setattr("sensorium.engine.loop.forget_code", lambda: rests.append("code"))
    engine.step()
    assert rests == ["trim", "code"]  # what loading has left
    engine.step()
    assert len(rests) == 2
    engine.run(*texts())
    assert len(rests) == 2  # not between steps
    engine.step()
    engine.step()
    assert len(rests) == 4


def test_nothing_of_a_failed_step_is_reused(model: Model) -> None:
    engine = bench(model, faults=Faults("step:raise:5"))
    prompt = random_prompt(1, 64)
    assert engine.run(request(prompt, 40))[0].reason == "error"
    assert engine.run(request(prompt, 4))[0].cached == 0


def test_blame_is_narrowed_when_a_step_fails_again(model: Model) -> None:
    """One poisonous request: its batch dies once; the next batch of the same shape loses only the poison."""

    def poisoned() -> list[EngineRequest]:
        return [request(random_prompt(i, 10), 6) for i in range(3)] + [request([77] * 10, 6)]

    engine = bench(model, enable_prefix_caching=False)
    launch = engine.engine.runner.launch

    def trip(plan: Any) -> Any:
        if any(seq.tokens[0] == 77 for seq in plan.sequences()):
            raise RuntimeError("poison")
        return launch(plan)

    engine.engine.runner.launch = trip  # type: ignore[method-assign]
    assert {r.reason for r in engine.run(*poisoned())} == {"error"}
    again = engine.run(*poisoned())
    assert [r.reason for r in again] == ["length"] * 3 + ["error"]
    assert tokens_of(again[:3]) == tokens_of(solo(model, poisoned()[:3]))


def test_a_row_that_is_not_a_number_fails_alone(model: Model) -> None:
    """R3: and its blocks, which may hold the same, are not reused."""
    requests = [request(random_prompt(i, 40), 6) for i in range(4)]
    engine = bench(model)
    sample = engine.engine.runner._sampler.sample

    def spoiled(logits: Tensor, sequences: Any, ahead: Any = ()) -> Any:
        for row, seq in enumerate(sequences):
            if seq.id == requests[2].id and seq.num_outputs == 3:
                logits[row, 100] = float("nan")
        return sample(logits, sequences, ahead)

    engine.engine.runner._sampler.sample = spoiled  # type: ignore[method-assign]
    results = engine.run(*requests)
    assert [(r.reason, r.error) for r in results] == [
        ("length", ""),
        ("length", ""),
        ("error", NOT_FINITE),
        ("length", ""),
    ]
    others = [requests[i] for i in (0, 1, 3)]
    assert tokens_of([results[i] for i in (0, 1, 3)]) == tokens_of(solo(model, others))
    assert engine.run(request(random_prompt(2, 40)))[0].cached == 0
    assert engine.run(request(random_prompt(0, 40)))[0].cached == 32


def test_a_failing_tower_fails_its_request_only(model: Model) -> None:
    """R2: one broken picture among good ones and seven texts."""
    bad = image_request(5, 8)
    features = bad.prompt.media[0]
    bad = replace(
        bad,
        prompt=replace(
            bad.prompt, media=(replace(features, arrays={**features.arrays, "pixels": features.arrays["pixels"][:-1]}),)
        ),
    )
    good = [*texts(8)[:6], image_request(1, 8)]
    engine = bench(model)
    results = engine.run(*good[:3], bad, *good[3:])
    assert (results[3].reason, results[3].error) == ("error", MEDIA_FAILED)
    del results[3]
    assert tokens_of(results) == tokens_of(solo(model, good))


def test_more_pictures_than_the_encoder_cache_holds(model: Model) -> None:
    """Pinned items never evict each other, and one larger than the whole cache still gets through."""
    requests = [image_request(i, 4, images=3, grid=(8, 8)) for i in range(3)]
    expected = tokens_of(solo(model, requests))
    for rows in (16, 40, 5):
        engine = bench(model, encoder_cache_memory=rows * 64 * 4, enable_prefix_caching=False)
        assert tokens_of(engine.run(*(replace(one, id=one.id + rows * 10_000) for one in requests))) == expected
        assert engine.engine.encoder.size_bytes <= max(rows, 16) * 64 * 4


# Logprobs and pooling


@pytest.mark.parametrize("chunk", [2048, 7])
def test_prompt_logprobs_are_those_of_the_tokens(model: Model, chunk: int) -> None:
    prompt = random_prompt(1, 40)
    engine = bench(model, max_num_batched_tokens=chunk)
    engine.run(request(prompt, 2))  # a warm cache must not hide them
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        for seq in [*scheduler.prefilling, *scheduler.decoding] if step in (2, 9) else []:
            scheduler._preempt(seq)

    [result] = engine.run(request(prompt, 4, prompt_logprobs=2, logprobs=1), before_step=preempt)
    assert len(result.prompt_logprobs) == 40
    assert result.prompt_logprobs[0] is None
    assert [one.token_id for one in result.prompt_logprobs[1:] if one] == prompt[1:]
    for cut in (5, 20, 39):
        [shorter] = bench(model).run(request(prompt[:cut], 1, logprobs=2))
        entry = result.prompt_logprobs[cut]
        assert entry is not None
        assert [token for token, _ in entry.top] == [token for token, _ in shorter.logprobs[0].top]
        assert entry.top[0][1] == pytest.approx(shorter.logprobs[0].top[0][1], abs=1e-5)
    assert all(one.top[0][0] == one.token_id for one in result.logprobs)
    [lone] = bench(model).run(request(prompt[:1], 2, prompt_logprobs=2))
    assert list(lone.prompt_logprobs) == [None]


def test_times_come_with_the_first_output_and_preemptions_with_the_last(model: Model) -> None:
    engine = bench(model, max_num_seqs=1)
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        for seq in list(scheduler.decoding) if step in (2, 3) else []:
            scheduler._preempt(seq)

    begun = time.monotonic()
    first, second = engine.run(request([1, 2, 3], 4), request([4, 5], 3, logprobs=0), before_step=preempt)
    whole = time.monotonic() - begun
    assert [len(one.times) for one in (first, second)] == [1, 1]
    assert 0 < first.times[0][0] < second.times[0][0] < whole  # the second waited for the first
    assert 0 < second.times[0][1] < whole
    assert (first.preemptions, second.preemptions) == (2, 0)
    plain = bench(model)
    plain.run(request(random_prompt(1, 20), 4))
    assert plain.core._step_tokens == 20 + 3
    assert plain.core._steps_by_tokens[:5] == [3, 0, 0, 1, 0]


@pytest.mark.parametrize("chunk", [2048, 9])
def test_pooling_runs_beside_generation(model: Model, chunk: int) -> None:
    model.poolers = {
        "embed": EmbedPooler(("last",), 64, normalize=True),
        "token_embed": VectorsPooler(64, normalize=False),
    }
    try:
        engine = bench(model, max_num_batched_tokens=chunk)
        prompt = random_prompt(1, 50)
        generating = request(prompt, 8)
        last, every, unknown = (
            replace(request(prompt), sampling=None, pooling=PoolingParams(task))
            for task in ("embed", "token_embed", "classify")
        )
        results = engine.run(generating, last, every, unknown)
    finally:
        del model.poolers
    assert tokens_of(results)[0] == tokens_of(solo(model, [generating]))[0]
    vector, vectors = results[1].vector, results[2].vector
    assert vector.shape == (64,)
    assert vectors.shape == (50, 64)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(vector, vectors[-1] / np.linalg.norm(vectors[-1]), atol=1e-5)
    assert results[3].reason == "error"


def test_long_rope_sequences_start_over_at_the_border(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "long_context_from", 40, raising=False)
    marks: list[tuple[int, bool]] = []
    forward = model.forward

    def spy(hidden: Tensor, positions: Tensor, cache: Any, context: Any) -> Tensor:
        marks.append((len(hidden), bool(context.long_context.all())))
        return forward(hidden, positions, cache, context)

    monkeypatch.setattr(model, "forward", spy)
    [result] = bench(model).run(request(random_prompt(1, 36), 10))
    assert len(result.tokens) == 10
    assert marks == [(36, False), *[(1, False)] * 4, (41, True), *[(1, True)] * 4]


@pytest.mark.parametrize(("chunk", "preempted"), [(2048, False), (13, False), (13, True)])
def test_dynamic_rope_is_that_of_each_sequence(tmp_path: Path, chunk: int, preempted: bool) -> None:
    """As transformers generates each prompt alone: lengths on both sides of the border, begun alike, in one engine."""
    oracle = make_llama(
        tmp_path, max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    )
    model = load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    tokens = random_prompt(1, 100)
    expected = []
    for length in (20, 40, 56, 100):
        oracle.model.rotary_emb.inv_freq = oracle.model.rotary_emb.original_inv_freq
        oracle.model.rotary_emb.max_seq_len_cached = 32
        out = oracle.generate(
            torch.tensor([tokens[:length]]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(out[0, length:].tolist())
    engine = bench(model, max_num_batched_tokens=chunk)
    assert engine.engine.ready.max_model_len == 128
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        if preempted and step % 7 == 6 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for _ in range(2):
        requests = [request(tokens[:length], 20) for length in (20, 40, 56, 100)]
        results = engine.run(*requests, before_step=preempt)
        assert tokens_of(results) == expected
    assert all(result.cached for result in results)


def test_a_context_beyond_the_checkpoints_is_said(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    longest = model.checkpoint.max_model_len
    assert bench(model, max_model_len=longest + 1).engine.ready.max_model_len == longest
    assert f"--max-model-len {longest + 1} is more than the checkpoint's {longest} positions" in caplog.text
    caplog.clear()
    bench(model, max_model_len=longest)
    assert not caplog.text


def test_step_size_never_exceeds_the_budget(model: Model) -> None:
    engine = bench(model, max_num_batched_tokens=24, max_num_seqs=6)
    sizes: list[int] = []
    launch = engine.engine.runner.launch

    def spy(plan: Any) -> Any:
        sizes.append(len(plan.decodes) + sum(count for _, count in plan.prefills))
        return launch(plan)

    engine.engine.runner.launch = spy  # type: ignore[method-assign]
    engine.run(*texts(), *itertools.chain(*(texts() for _ in range(2))))
    assert max(sizes) == 24
