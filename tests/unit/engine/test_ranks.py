"""One engine over several ranks, over gloo: the tokens of one process, whatever is scheduled; ranks that are lost."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints
from support.adapters import make_adapter
from support.engine_harness import Result, image_request, random_prompt, request
from support.ranks import ANSWER_S, Crew

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.adapters import Adapters
from sensorium.engine.batch import StepInput
from sensorium.engine.leader import Leader
from sensorium.engine.shared_towers import FollowedTowers, SharedTowers, shared_out
from sensorium.engine.step_messages import frame_of, step_of
from sensorium.ipc import messages
from sensorium.ipc import ranks as wire
from sensorium.ipc.messages import HEAD_BYTES, Kind
from sensorium.kernels.context import AttentionContext, Segments
from sensorium.models.base import finished
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest, MediaFeatures

BLOCK_BYTES = 2 * 2 * 2 * 16 * 8 * 4  # layers, keys and values, heads, tokens, head_dim, float32


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    torch.set_num_threads(1)
    with Crew() as found:
        yield found


def chats() -> list[EngineRequest]:
    """Equal beginnings, seeds, log-probabilities of outputs and of a prompt."""
    shared = random_prompt(40, 35)
    return [
        *(request(shared + random_prompt(i, 3 + 7 * i), 40) for i in range(4)),
        request(random_prompt(7, 50), 20, temperature=0.9, seed=11, logprobs=2),
        request(random_prompt(8, 30), 4, prompt_logprobs=1),
    ]


def answers(results: list[Result]) -> list[Any]:
    """All that says which tokens were chosen; log-probabilities are compared by their tokens."""
    return [(one.tokens, one.reason, one.error, [top.token_id for top in one.logprobs]) for one in results]


def run(crew: Crew, folder: Path, requests: list[EngineRequest], size: int, **options: Any) -> tuple[Any, int, int]:
    """(what was answered to all, one after the other and together; preemptions; cached tokens)"""
    with crew.engine(folder, size, **options) as bench:
        first = bench.run(requests[0])
        results = [*first, *bench.run(*requests[1:])]
        assert len(bench.engine.ready.rank_weight_bytes) == size
        return answers(results), bench.engine.scheduler.preemptions, sum(one.cached for one in results)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (checkpoints.make_llama, {"kv_cache_memory": 10 * BLOCK_BYTES, "max_model_len": 128}),
        (checkpoints.make_qwen3_moe, {"max_num_batched_tokens": 16, "kv_cache_dtype": "int8"}),
        (checkpoints.make_llama, {"quantization": "int8", "dtype": "bfloat16", "speculative_tokens": 4}),
    ],
    ids=["few blocks", "chunks", "drafts"],
)
def test_two_ranks_answer_as_one(crew: Crew, tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    make(tmp_path)
    requests = chats()
    expected, _, cached = run(crew, tmp_path, requests, 1, **options)
    has_little = "kv_cache_memory" in options
    halved = {"kv_cache_memory": options["kv_cache_memory"] // 2} if has_little else {}  # a rank has half of the heads
    found, preempted, cached_too = run(crew, tmp_path, requests, 2, **{**options, **halved})
    assert found == expected
    assert cached_too == cached
    assert not crew.lost
    assert preempted if has_little else cached


def test_every_rank_encodes_some_of_the_images(crew: Crew, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows reach all, also those of an image in chunks."""
    requests = [
        image_request(1, 12),
        image_request(1, 12),
        image_request(2, 12, images=2),
        image_request(3, 12, images=3),
    ]
    taken: list[tuple[int, int]] = []  # (rank, items that came back at a time)
    heard = Leader.encoded

    def encoded(self: Leader, rank: int) -> wire.Encoded:
        answer = heard(self, rank)
        taken.append((rank, len(answer.rows)))
        return answer

    monkeypatch.setattr(Leader, "encoded", encoded)
    for size, tokens in ((2, 24), (4, 512)):
        expected = run(crew, folder, requests, 1, max_num_batched_tokens=tokens)[0]
        taken.clear()
        assert run(crew, folder, requests, size, max_num_batched_tokens=tokens)[0] == expected
        assert {rank for rank, items in taken if items} == set(range(1, size))
    assert not crew.lost


def test_images_are_shared_out_by_their_rows() -> None:
    assert shared_out([36], 2) == [[0]]
    assert shared_out([10, 10, 10], 2) == [[0, 2], [1]]
    assert shared_out([10, 90, 30, 60], 2) == [[1, 0], [3, 2]]
    assert shared_out([5, 7], 4) == [[1], [0]]


class Follows:
    """A leader with one follower, whose towers are asked at once. `pieces` of each item, whose rows are its key's."""

    size = 2

    def __init__(self, broken: str = "") -> None:
        self.answers: list[wire.Encoded] = []
        self.kinds: list[int] = []
        self.broken = broken  # the item that a tower fails at
        self.towers = FollowedTowers(self.encode, lambda error: isinstance(error, MemoryError), self._answer)

    def _answer(self, frame: bytes) -> None:
        self.answers.append(wire.decode_rows(memoryview(frame)[HEAD_BYTES:]))

    def encode(self, kind: str, items: Sequence[MediaFeatures]) -> Any:
        for one in items:
            for _ in range(one.num_rows):
                yield 10 * one.num_rows
            if one.key.decode() == self.broken:
                raise ValueError("a broken image")
        return [torch.full((one.num_rows, 3), ord(one.key), dtype=torch.bfloat16) for one in items]

    def send_to(self, rank: int, frame: bytes) -> None:
        kind, payload = messages.parse_head(frame[:HEAD_BYTES])[1], memoryview(frame)[HEAD_BYTES:]
        self.kinds.append(kind)
        of_kind = {Kind.ENCODE: "begin", Kind.ADVANCE: "advance", Kind.FORGET: "forget"}
        getattr(self.towers, of_kind[Kind(kind)])(payload)

    def encoded(self, rank: int) -> wire.Encoded:
        return self.answers.pop(0)

    def job(self, *rows: int) -> Any:
        items = [MediaFeatures("image", bytes([97 + i]), count, {}) for i, count in enumerate(rows)]
        towers = SharedTowers(self.encode, self, torch.device("cpu"))  # type: ignore[arg-type]
        return towers.encoding("image", items)


def test_pieces_of_all_ranks_are_computed_together() -> None:
    follows = Follows()
    steps, macs = follows.job(1, 4, 2), []
    with pytest.raises(StopIteration) as end:
        while True:
            macs.append(next(steps))
    assert macs == [40, 40, 40, 40]  # rank 0 has b, the other one c and a
    assert [(len(one), int(one[0, 0])) for one in end.value.value] == [(1, 97), (4, 98), (2, 99)]
    assert all(one.dtype == torch.bfloat16 for one in end.value.value)
    assert follows.kinds == [Kind.ENCODE, *[Kind.ADVANCE] * 3] and not follows.answers


def test_a_tower_that_fails_on_one_rank_leaves_none_behind() -> None:
    for broken, told in (("c", "rank 1: ValueError: a broken image"), ("d", "a broken image")):
        follows = Follows(broken)
        with pytest.raises((RuntimeError, ValueError), match=f"^{told}$"):
            finished(follows.job(1, 2, 3, 4))
        assert not follows.answers and not follows.towers._parts
    follows = Follows()
    steps = follows.job(3, 3)
    next(steps)
    steps.close()  # nobody wants them any more
    assert follows.kinds == [Kind.ENCODE, Kind.FORGET] and not follows.towers._parts


def test_four_ranks_with_fewer_heads_of_keys(crew: Crew, tmp_path: Path) -> None:
    """Llama has two, so that two ranks each have a copy of one; Qwen2-VL and a mixture likewise in test_split."""
    checkpoints.make_llama(tmp_path)
    few = {"max_model_len": 128, "max_num_batched_tokens": 16}
    requests = chats()[:4]
    expected, _, cached = run(crew, tmp_path, requests, 1, kv_cache_memory=10 * BLOCK_BYTES, **few)
    found, preempted, cached_too = run(crew, tmp_path, requests, 4, kv_cache_memory=5 * BLOCK_BYTES, **few)
    assert found == expected and not crew.lost
    assert preempted and cached == cached_too


@pytest.mark.parametrize(
    ("size", "options"),
    [(2, {}), (4, {"max_num_batched_tokens": 16}), (2, {"quantization": "int8", "dtype": "bfloat16"})],
    ids=["float32", "four ranks", "int8"],
)
def test_adapters_are_split_with_their_layers(crew: Crew, tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    """Two in a batch with their base; what is unloaded answers the requests that have it."""
    checkpoints.make_llama(tmp_path / "base")
    folders = [make_adapter(tmp_path / f"{seed}", tmp_path / "base", seed=seed, rank=2 + seed) for seed in (1, 2)]
    requests = [replace(request(random_prompt(i % 4, 9 + 3 * i), 8), adapter=i % 3) for i in range(9)]
    answered = []
    for ranks in (1, size):
        with crew.engine(tmp_path / "base", ranks, **options) as bench:
            adapters = bench.engine.adapters
            assert [adapters.load(number, str(folder)) for number, folder in enumerate(folders, 1)] == ["", ""]
            answered.append(answers(bench.run(*requests)))
            later = [replace(one, id=one.id + 500) for one in requests]
            bench.add(*later)
            adapters.unload(1)
            bench.run()
            assert answers([bench.results[one.id] for one in later]) == answered[-1]
            assert "adapter_config.json" in adapters.load(3, str(tmp_path / "base")) and adapters.find(3) is None
            assert adapters.load(4, str(folders[0])) == ""
            again = [replace(one, id=one.id + 1000, adapter=4) for one in requests if one.adapter == 1]
            assert answers(bench.run(*again)) == answered[-1][1::3]
    assert answered[0] == answered[1]
    assert not crew.lost


class Told:
    """A leader whose followers load everything but what is named so."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.frames: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)

    def adapters_loaded(self) -> list[tuple[str, int]]:
        return [("", 1000), (self.refusal, 0)]


def test_other_ranks_drop_an_adapter_when_nobody_has_it_any_more(tmp_path: Path) -> None:
    checkpoints.make_llama(tmp_path / "base")
    model = load_model(open_checkpoint(tmp_path / "base"), dtype=torch.float32, device="cpu")
    folder = str(make_adapter(tmp_path / "adapter", tmp_path / "base"))
    told: Any = Told()
    adapters = Adapters(model, torch.float32, torch.device("cpu"), told)
    load, unload = messages.encode_load_adapter(1, folder), messages.encode_unload_adapter(1)
    assert adapters.load(1, folder) == "" and told.frames == [load]
    held = adapters.find(1)
    assert held is not None and adapters.nbytes(1) == held.nbytes + 1000
    adapters.unload(1)
    gc.collect()
    assert adapters.nbytes(1) == 0 and told.frames == [load]
    del held
    assert told.frames == [load, unload]

    told.frames, told.refusal = [], "rank 2 has no memory"
    assert adapters.load(1, folder) == told.refusal
    assert adapters.find(1) is None and told.frames == [load, unload]


class Lost:
    """What a leader does about ranks that it loses, and its followers' ends of their sockets."""

    def __init__(self, pid: int | None = None, size: int = 2, hang_after_s: float = 0.1) -> None:
        pairs = [socket.socketpair() for _ in range(size - 1)]
        self.theirs = [theirs for _, theirs in pairs]
        self.told: list[str] = []
        self.codes: list[int] = []
        self.ended = threading.Event()
        config = EngineConfig(model="", hang_after_s=hang_after_s)
        self.leader = Leader(config, [(ours, pid) for ours, _ in pairs], tell=self.told.append, end=self._end)

    def _end(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()

    def wait(self) -> list[str]:
        assert self.ended.wait(ANSWER_S)
        return self.told


@contextmanager
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_follower_that_ends_takes_the_engine_along_and_is_named() -> None:
    lost = Lost(size=3)
    lost.theirs[1].close()
    assert lost.wait() == ["rank 2 of 3 has ended"]
    assert lost.codes and lost.codes[0]


def test_what_a_follower_says_of_its_end_is_told() -> None:
    lost = Lost()
    lost.theirs[0].sendall(messages.encode_lost("failed: RuntimeError: out of memory"))
    lost.theirs[0].close()
    assert lost.wait() == ["rank 1 of 2 failed: RuntimeError: out of memory"]


def test_a_stopped_follower_is_named_and_killed() -> None:
    with child() as process:
        os.kill(process.pid, signal.SIGSTOP)
        lost = Lost(process.pid)
        while not lost.ended.wait(0.05):
            lost.leader.look()
        assert lost.told[0].startswith("rank 1 of 2 has given no sign of life for ")
        assert process.wait(ANSWER_S) == -signal.SIGKILL


def test_who_works_while_the_others_wait_is_blamed_for_a_step_that_hangs() -> None:
    lost = Lost(size=3)
    lost.theirs[0].sendall(wire.encode_beat(works=False))
    lost.theirs[1].sendall(wire.encode_beat(works=True))
    while not lost.ended.wait(0.05):
        lost.leader.blame_hanging()
    assert lost.told == ["rank 2 of 3 hangs in a step"]


def test_nobody_is_blamed_for_the_end_of_all() -> None:
    with child() as process:
        lost = Lost(process.pid)
        lost.leader.close()
        assert process.wait(ANSWER_S) == -signal.SIGKILL
        lost.theirs[0].close()
        lost.leader.look()
    assert not lost.told and not lost.codes


def test_a_follower_gets_the_steps_input() -> None:
    ids, places = torch.arange(5), torch.arange(5) + 32
    table = torch.tensor([[2, 0], [4, 1]], dtype=torch.int32)
    marks, seen = torch.tensor([True, False, True, False, True]), torch.arange(5, dtype=torch.int32)
    context = AttentionContext(
        [1, 4], [20, 4], 1, 16, torch.tensor([0, 1, 5]), torch.tensor([20, 4]), table, places, marks, visible=seen
    )
    context.others.append(AttentionContext([1, 4], [20, 4], 1, 16, ids, ids, table + 1, places + 1))
    context.segments = Segments([1, 4], 1, torch.tensor([3, 0]), torch.tensor([5, 6]))
    context.needed_states = "last"
    frame = frame_of(StepInput(ids, torch.stack([ids] * 3), context))
    assert messages.parse_head(frame[:HEAD_BYTES])[1] == Kind.STEP
    step = step_of(memoryview(frame)[HEAD_BYTES:]).inputs
    found, runs = step.context, step.context.runs
    assert (found.query_lens, found.context_lens, found.num_decodes, found.block_size) == ([1, 4], [20, 4], 1, 16)
    assert (found.needed_states, runs.lengths, runs.num_singles) == ("last", [1, 4], 1)
    pairs = [(step.token_ids, ids), (step.positions, torch.stack([ids] * 3)), (found.block_tables, table)]
    pairs += [(found.by_table(1).block_tables, table + 1), (found.by_table(1).slots, places + 1), (found.slots, places)]
    pairs += [(runs.sources, torch.tensor([3, 0])), (runs.targets, torch.tensor([5, 6]))]
    assert found.long_context is not None and found.visible is not None
    pairs += [(found.long_context, marks), (found.visible, seen)]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)
    assert np.array_equal(wire.decode_logits(wire.encode_logits(np.array([1, 4]))[HEAD_BYTES:]), [1, 4])  # type: ignore[arg-type]
