"""Decodes that are replayed as graphs: the same tokens, whatever happens between and in the steps.

A machine without a GPU replays functions over the same memory. All engine tests can run so:
`SENSORIUM_TEST_GRAPHS=1 pytest tests/unit/engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints
from support.disturbances import CASES, Disturb, chats
from support.engine_harness import Bench, Replayed, Result, bench, image_request, random_prompt, request

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine.faults import Faults
from sensorium.engine.graphs import SIZES, Graphs, graph_sizes
from sensorium.engine.staging import MAX_VIEWS, Staging
from sensorium.kernels.context import LayerCache
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, Grammar

CPU = torch.device("cpu")


def run(
    model: Model,
    requests: list[EngineRequest],
    capture: Replayed | None,
    disturb: Disturb | None = None,
    **options: Any,
) -> tuple[list[Result], Bench]:
    faults = Faults(options.pop("faults", ""))
    engine = bench(model, faults=faults, capture=capture, **options)
    runner = engine.engine.runner
    runner._faults, runner.overlaps = faults, capture is not None

    def before(step: int) -> None:
        if disturb is not None:
            disturb(engine, step)

    return engine.run(*requests, before_step=before), engine


def check_same(got: list[Result], expected: list[Result]) -> None:
    assert [(one.tokens, one.reason, one.error, one.preemptions) for one in got] == [
        (one.tokens, one.reason, one.error, one.preemptions) for one in expected
    ]
    for one, other in zip(got, expected, strict=True):
        assert np.allclose([at.logprob for at in one.logprobs], [at.logprob for at in other.logprobs], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes(model: Model, case: str) -> None:
    disturb, sampling, options = CASES[case]
    requests, capture = chats(**sampling), Replayed()
    expected, _ = run(model, requests, None, disturb, **options)
    got, _ = run(model, requests, capture, disturb, **options)
    check_same(got, expected)
    assert capture.captured == len(graph_sizes(8))
    assert capture.replays > 5


def test_sequences_of_a_step_that_fails_again_are_computed_one_by_one(model: Model) -> None:
    """Each in the graph of one: only whose own step fails ends."""
    requests = [request(random_prompt(i, 20), 12) for i in range(4)]
    expected, _ = run(model, requests, None)
    faults = Faults("step:raise:4")
    engine = bench(model, faults=faults, capture=(capture := Replayed()))
    engine.engine.runner._faults = faults
    engine.core._failed_shapes.add((4,))
    got = engine.run(*requests)
    check_same(got, expected)
    assert capture.replays == 10 + 4


def test_a_late_end(model: Model) -> None:
    free, _ = run(model, chats(), None)
    stop = free[1].tokens[9]
    expected, _ = run(model, chats(stop_token_ids=(stop,)), None)
    got, _ = run(model, chats(stop_token_ids=(stop,)), Replayed())
    check_same(got, expected)
    assert {one.reason for one in got} > {"stop"}


def test_answers_of_a_form(model: Model, folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder, vocab_size=model.checkpoint.vocab_size)
    answers = []
    for capture in (None, Replayed()):
        engine = bench(model, capture=capture, speculative_tokens=16)
        engine.core._grammars.vocabulary = tokenizer.vocabulary(model.checkpoint.stop_token_ids)
        form = Grammar("regex", "(yes|no), [a-z]{4,9}")
        asked = [request(random_prompt(i, 20), 30, grammar=form, seed=i, temperature=i % 2) for i in range(4)]
        answers.append(engine.run(*asked, image_request(3, 20)))
    check_same(answers[1], answers[0])


MAKERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (checkpoints.make_gemma3_text, {"sliding_window": 8}),  # several tables
    (checkpoints.make_lfm2, {}),  # states
]


@pytest.mark.parametrize(("make", "changes"), MAKERS)
def test_tables_and_states(tmp_path: Path, make: Callable[..., Any], changes: dict[str, Any]) -> None:
    make(tmp_path, **changes)
    model = load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    requests = [request(random_prompt(i, 10 + 9 * i), 30) for i in range(3)]
    expected, _ = run(model, requests, None)
    got, _ = run(model, requests, capture := Replayed())
    check_same(got, expected)
    assert capture.replays > 25


def test_padding_writes_where_nobody_reads(model: Model) -> None:
    """Three sequences in a graph of four, and a cache in which whatever nobody wrote is no number."""
    engine = bench(model, capture=Replayed(), enable_prefix_caching=False)
    caches = [one for one in engine.engine.runner._cache if isinstance(one, LayerCache)]
    for keys, values, _ in caches:
        keys.fill_(torch.nan), values.fill_(torch.nan)
    results = engine.run(*(request(random_prompt(i, 20), 20) for i in range(3)))
    assert all(result.reason == "length" for result in results)
    blocks = engine.engine.scheduler.pool.num_blocks
    written = [int(keys[:blocks].isfinite().any(dim=(1, 3)).sum()) for keys, _, _ in caches]
    assert written == [3 * 39] * len(caches)  # the last token has no keys
    assert all(len(keys) == blocks + 1 for keys, _, _ in caches)


def test_a_step_that_lies_elsewhere_is_computed_without(model: Model) -> None:
    """A graph reads its own places only: where the staging has no room, the step's arrays are in others."""
    expected, _ = run(model, [request(random_prompt(1, 20), 10)], None)
    engine = bench(model, capture=(capture := Replayed()))
    staging = engine.engine.runner._builder._staging
    assert staging is not None
    staging._arrays = [array[:0] for array in staging._arrays]
    [got] = engine.run(request(random_prompt(1, 20), 10))
    assert got.tokens == expected[0].tokens
    assert capture.replays == 0


def test_graphs_are_made_one_by_one_and_used_as_far_as_they_are_there(model: Model) -> None:
    capture = Replayed()
    graphs = Graphs(20, 10, CPU, capture)
    assert graphs.sizes == (1, 2, 4, 8, 16, 24)
    assert graphs.padded(1) is None

    def add() -> None:
        graphs.add(engine.engine.runner._builder.blank, lambda inputs, out: None)

    engine = bench(model, capture=Replayed(), max_num_seqs=20)
    add()
    assert (graphs.padded(1), graphs.padded(2)) == (1, None)
    add()
    assert (graphs.padded(2), graphs.padded(24), graphs.padded(25)) == (24, 24, None)
    while graphs.missing:
        add()
    assert [graphs.padded(count) for count in (1, 2, 3, 9, 17)] == [1, 2, 4, 16, 24]
    graphs.drop()
    assert (graphs.missing, graphs.padded(1)) == (True, None)


def test_fifteen_sizes() -> None:
    assert len(SIZES) == 15
    assert graph_sizes(1) == (1,)
    assert graph_sizes(256) == graph_sizes(1000) == SIZES


# What goes to the device


def test_places_follow_from_sizes() -> None:
    staging = Staging(4096, CPU)
    places = []
    for step in range(5):
        staging.begin()
        tensors = [staging.put(np.full(count, step, np.int64)) for count in (3, 1, 7)]
        more = staging.put(np.array([[True, False]]))
        staging.send()
        assert [one.tolist() for one in tensors] == [[step] * 3, [step], [step] * 7]
        assert more.tolist() == [[True, False]]
        places.append([one.data_ptr() for one in (*tensors, more)])
    assert all(one == places[0] for one in places)
    assert staging.copies == 5


def test_what_was_not_sent_is_dropped() -> None:
    staging = Staging(4096, CPU)
    staging.begin()
    first = staging.put(np.arange(4))
    staging.begin()
    second = staging.put(np.arange(4) + 10)
    staging.send()
    assert first is second
    assert second.tolist() == [10, 11, 12, 13]


def test_what_has_no_room_goes_by_itself() -> None:
    staging = Staging(64, CPU)
    staging.begin()
    assert staging.put(np.arange(9)).tolist() == list(range(9))
    assert staging.spilled and staging.copies == 1
    small = staging.put(np.arange(8))
    staging.send()
    assert small.tolist() == list(range(8))
    for count in range(MAX_VIEWS + 10):  # the views that are kept are bounded
        staging.begin()
        staging.put(np.zeros((1, count, 0)))
    assert len(staging._views) <= MAX_VIEWS
