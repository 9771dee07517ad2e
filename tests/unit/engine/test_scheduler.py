"""The scheduler without a model: whatever comes in whatever order, its books are straight and nobody starves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sensorium.engine.block_pool import BlockPool
from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.memory import longest_sequence
from sensorium.engine.prefix_cache import PrefixCache
from sensorium.engine.scheduler import LEAST_CHUNK, NO_ROOM, Budget, Plan, Scheduler, spans_within
from sensorium.engine.sequence import Sequence, Status
from sensorium.engine.state_slots import ZERO_SLOT, StateSlots
from sensorium.types import EngineRequest, MediaFeatures, MediaSpan, PoolingParams, Prompt, SamplingParams

BLOCK = 4


def make_scheduler(
    num_blocks: int = 16,
    *,
    seqs: int = 4,
    tokens: int = 12,
    rows: int = 6,
    encoder_rows: int = 8,
    caching: bool = True,
    slots: int = 0,
    **budget: Any,
) -> Scheduler:
    """`slots` of states; 0: no layer keeps one."""
    pool = BlockPool(num_blocks)
    limits = Budget(seqs, tokens, rows, num_blocks * BLOCK, BLOCK, **budget)
    if limits.tables().has_windows:
        limits = replace(limits, max_model_len=longest_sequence(limits.tables(), 200, num_blocks))
    states = StateSlots(slots) if slots else None
    prefixes = PrefixCache(pool, limits.tables(), b"model", enabled=caching, states=states)
    return Scheduler(limits, pool, prefixes, EncoderCache(encoder_rows, 1), {"embed": True})


def make_request(
    request_id: int,
    tokens: list[int],
    max_tokens: int = 4,
    *,
    priority: int = 0,
    media: list[tuple[int, int, str]] | None = None,
) -> EngineRequest:
    """`media`: (offset, rows, name) of each picture."""
    spans = tuple(MediaSpan(i, offset, rows) for i, (offset, rows, _) in enumerate(media or ()))
    features = tuple(MediaFeatures("image", name.encode(), rows) for _, rows, name in media or ())
    return EngineRequest(
        request_id, Prompt(np.array(tokens, np.int32), features, spans), SamplingParams(max_tokens), priority=priority
    )


def compute(scheduler: Scheduler, plan: Plan, token: int = 7, *, encode: bool = True) -> list[int]:
    """What the core does with a plan, with a model that always says `token`. Ids of sequences that ended."""
    for key in plan.encode if encode else ():
        scheduler.encoder.fill(key, key)
    ended = []
    for seq, count in plan.drafted:
        assert all(len(blocks) * BLOCK >= seq.num_computed + count for blocks in seq.blocks)
        right = next((i for i, draft in enumerate(seq.drafts) if draft != token), len(seq.drafts))
        assert scheduler.advance(seq, 1)
        if scheduler.commit(seq, [token] * (right + 1)):
            ended.append(seq.id)
        else:
            assert seq.num_computed == seq.num_tokens - 1 or seq.status is Status.WAITING
    for seq, count in [*((seq, 1) for seq in plan.decodes), *plan.prefills]:
        for span in spans_within(seq, seq.num_computed, seq.num_computed + count):
            assert scheduler.encoder.rows(seq.item_keys[span.item]) is not None
        if scheduler.advance(seq, count) and scheduler.commit(seq, [token]):
            ended.append(seq.id)
    return ended


def step(scheduler: Scheduler) -> Plan:
    plan, ended = scheduler.schedule()
    assert not ended
    compute(scheduler, plan)
    return plan


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 20),
        seqs=st.integers(1, 5),
        tokens=st.integers(2, 20),
        rows=st.integers(1, 10),
        encoder_rows=st.integers(1, 12),
        caching=st.booleans(),
        drafts=st.integers(0, 3),
        windows=st.sampled_from([(None,), (5,), (None, 5), (None, 4, 4), (3, 9)]),
        keys_at_once=st.sampled_from([1, 6]),
        slots=st.sampled_from([0, 3, 5, 8, 30]),
    )
    def start(self, drafts: int, **options: Any) -> None:
        self.scheduler = make_scheduler(**options)
        if drafts:
            self.scheduler.propose = lambda seq, most: [5] * min(most, drafts)
        self.tokens = options["tokens"]
        self.alive: dict[int, Sequence] = {}
        self.awaited: dict[Any, MediaFeatures] = {}
        self.waited: Counter[int] = Counter()
        self.states: dict[int, list[Any]] = {ZERO_SLOT: []}  # what each slot is the state of
        self.next_id = 0

    @rule(
        data=st.data(),
        prefix=st.integers(0, 2),
        length=st.integers(1, 18),
        max_tokens=st.integers(1, 8),
        priority=st.integers(0, 1),
    )
    def add(self, data: st.DataObject, prefix: int, length: int, max_tokens: int, priority: int) -> None:
        media = None
        if data.draw(st.booleans()):
            first = data.draw(st.integers(0, length - 1))
            second = data.draw(st.integers(first, length))
            media = [(first, second - first or 1, data.draw(st.sampled_from("abc")))]
            if second + 2 <= length:
                media.append((second + 1, length - second - 1, "d"))
            media = [(offset, rows, f"{name}{rows}") for offset, rows, name in media]
        self.next_id += 1
        request = make_request(self.next_id, [prefix] * length, max_tokens, priority=priority, media=media)
        turn = data.draw(st.sampled_from([b"a", b"a", b"b", b"c"]))
        request = replace(request, turn=turn, salt=b"" if turn == b"a" else turn)
        refusal = self.scheduler.add(request)
        fits = length + max_tokens <= self.scheduler.budget.max_model_len
        assert (refusal is None) == fits
        if refusal is None:
            self.alive[self.next_id] = self.scheduler._by_id[self.next_id]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), preempt=st.booleans(), fail=st.booleans())
    def disturb(self, data: st.DataObject, preempt: bool, fail: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        seq = self.alive[request_id]
        if preempt:
            if seq.status in (Status.PREFILLING, Status.DECODING):
                self.scheduler._preempt(seq)
            return
        if fail:
            assert self.scheduler.fail(seq, "broken").finish_reason == "error"
        else:
            assert self.scheduler.abort(request_id)
        assert not self.scheduler.abort(request_id)
        del self.alive[request_id]

    @precondition(lambda self: self.alive)
    @rule(token=st.integers(5, 6), failing_tower=st.booleans())
    def step(self, token: int, failing_tower: bool) -> None:
        plan, ended = self.scheduler.schedule()
        assert not ended
        assert plan or plan.encode or self.awaited, "there is work and nothing is done"
        self.awaited |= {key: one.features for key, one in plan.encode.items()}
        sizes = [count for _, count in plan.work]
        assert sum(sizes) <= self.tokens
        assert min(sizes, default=1) > 0
        planned = [one.features for one in plan.encode.values()]
        assert len(planned) <= 1 or sum(one.num_rows for one in planned) <= self.scheduler.budget.max_encoder_rows
        for seq in plan.sequences():
            self.check_tables(seq, dict(plan.work)[seq])
        if self.scheduler.prefixes.states is not None:
            self.write_states(plan)
        for request_id in compute(self.scheduler, plan, token, encode=False):
            assert self.alive.pop(request_id).status is Status.DONE
        self.run_towers(failing_tower)

    def check_tables(self, seq: Sequence, count: int) -> None:
        """A step finds all that its tokens see and write, and of windows no more is held than its tables say."""
        tables = self.scheduler.tables
        for blocks, released, window in zip(seq.blocks, seq.num_released, tables.windows, strict=True):
            assert len(blocks) * BLOCK >= seq.num_computed + count
            assert released <= tables.first(window, seq.num_computed)
            if window is not None:
                assert len(blocks) - released <= tables.most(window)

    def write_states(self, plan: Plan) -> None:
        """A step goes on from the states of the very tokens before it, and writes where nobody reads."""
        work = plan.work
        targets = [slot for seq, _ in work for _, slot in seq.segments]
        assert len(set(targets)) == len(targets)
        assert set(targets).isdisjoint({ZERO_SLOT, *(seq.state for seq in self.alive.values())})
        for seq, count in work:
            place = seq.num_computed
            assert self.states[seq.state] == inputs(seq, place)
            assert sum(tokens for tokens, _ in seq.segments) == count
            for tokens, slot in seq.segments:
                place += tokens
                self.states[slot] = inputs(seq, place)

    def run_towers(self, failing: bool) -> None:
        """One item after the other, as late as may be."""
        wanted = [key for key in self.awaited if self.scheduler.encoder.is_awaited(key)]
        self.awaited = {key: self.awaited[key] for key in wanted[1:]}
        if wanted and failing:
            for output in self.scheduler.drop_failed_items([wanted[0]], "no"):
                del self.alive[output.id]
        elif wanted:
            self.scheduler.encoder.fill(wanted[0], wanted[0])

    @invariant()
    def books_are_straight(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check_integrity()
        users = Counter(
            block
            for seq in self.alive.values()
            for blocks, released in zip(seq.blocks, seq.num_released, strict=True)
            for block in blocks[released:]
        )
        assert users == Counter({b: n for b, n in enumerate(scheduler.pool._references) if n})
        pins = Counter(seq.item_keys[item] for seq in self.alive.values() for item in seq.pinned)
        assert pins == Counter({k: e.pins for k, e in scheduler.encoder._entries.items() if e.pins})
        if scheduler.prefixes.states is not None:
            held = Counter(
                slot for seq in self.alive.values() for slot in (seq.state, *(slot for _, slot in seq.segments))
            )
            references = scheduler.prefixes.states.pool._references
            assert Counter({s: n for s, n in enumerate(references) if n and s}) == Counter(
                {slot: count for slot, count in held.items() if slot}
            )
        slots = [seq.slot for seq in self.alive.values() if seq.slot >= 0]
        assert len(set(slots)) == len(slots) == scheduler.num_running
        assert set(slots).isdisjoint(scheduler._free_slots)
        states = {
            Status.WAITING: scheduler.waiting,
            Status.PREFILLING: scheduler.prefilling,
            Status.DECODING: scheduler.decoding,
        }
        for status, queue in states.items():
            assert {s.id for s in queue} == {s.id for s in self.alive.values() if s.status is status}
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda s: s.order)

    def teardown(self) -> None:
        """Nobody starves: without new requests all end within a few times as many steps as there are tokens."""
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        bound = 20 + 8 * sum(seq.num_prompt + seq.max_tokens for seq in self.alive.values())
        for _ in range(bound):
            if not self.alive:
                break
            self.step(token=5, failing_tower=False)
        assert not self.alive
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        assert scheduler.encoder.pinned_bytes == 0


def inputs(seq: Sequence, count: int) -> list[Any]:
    """All that a state after so many tokens depends on: those tokens, drafts too, and the rows of media in them."""
    known: list[Any] = [*seq.tokens[: seq.num_tokens].tolist(), *seq.drafts][:count]
    for span in spans_within(seq, 0, count):
        for place in range(span.offset, min(span.offset + span.length, count)):
            known[place] = (known[place], seq.item_keys[span.item], place - span.offset)
    return [seq.request.salt, *known] if count else []


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestSchedulerBooks = SchedulerMachine.TestCase


def ids(plan: Plan) -> list[int]:
    return [seq.id for seq in plan.sequences()]


def test_first_come_first_served_within_a_priority() -> None:
    scheduler = make_scheduler(seqs=2)
    for request_id, priority in ((1, 0), (2, 1), (3, 0), (4, -1)):
        scheduler.add(make_request(request_id, [request_id] * 3, 1, priority=priority))
    assert [ids(step(scheduler)) for _ in range(2)] == [[4, 1], [3, 2]]


def test_a_step_is_bounded_in_what_its_tokens_attend_to() -> None:
    """The end of a long prompt comes in smaller chunks, several prompts share the bound, and all are computed."""
    scheduler = make_scheduler(1000, tokens=1000, max_pairs=200_000)
    for request_id in range(3):
        scheduler.add(replace(make_request(request_id, [request_id] * 1200, 1), turn=b"a"))
    chunks = [step(scheduler).prefills]
    scheduler.add(replace(make_request(9, [9] * 20, 1), turn=b"b"))
    for _ in range(2):
        chunks.append(step(scheduler).prefills)
    assert 9 in {seq.id for seq, _ in chunks[1]}
    while scheduler.has_work():
        before = {seq.id: seq.num_computed for seq in scheduler.prefilling}
        plan = step(scheduler)
        pairs = sum(count * (before.get(seq.id, 0) + count) for seq, count in plan.prefills)
        assert pairs <= 200_000 or [count for _, count in plan.prefills] == [LEAST_CHUNK]
        chunks.append(plan.prefills)
    assert chunks[0][0][1] == 447  # 447 * 447 < 200,000 < 448 * 448
    totals: Counter[int] = Counter()
    for plan_chunks in chunks:
        for seq, count in plan_chunks:
            totals[seq.id] += count
    assert totals == {0: 1200, 1: 1200, 2: 1200, 9: 20}


def test_tenants_take_turns() -> None:
    """One tenant's many long prompts do not keep another one's short prompt waiting, in the queue or beside them."""
    scheduler = make_scheduler(num_blocks=200, tokens=10, seqs=8, caching=False)
    for request_id in range(1, 6):
        scheduler.add(replace(make_request(request_id, [1] * 40, 1), turn=b"a"))
    assert ids(step(scheduler)) == ids(step(scheduler)) == [1]
    for request_id in (6, 7):
        scheduler.add(replace(make_request(request_id, [2] * 15, 1), turn=b"b"))
    turns = [ids(step(scheduler)) for _ in range(8)]
    assert turns[0] == [6]  # both have had as much, and this one has nothing running
    assert any(6 in turn for turn in turns[1:6])
    assert sum(6 in turn or 7 in turn for turn in turns) >= 3
    assert sum(1 in turn or 2 in turn for turn in turns) >= 4
    while scheduler.has_work():
        step(scheduler)
    assert not scheduler._tenants


def greedy_tenant(scheduler: Scheduler, count: int, *, waits: bool = False) -> None:
    """A tenant `a` with so many long prompts, in decode or (`waits`) with a media item whose tower takes for ever."""
    for request_id in range(1, count + 1):
        media = [(1, 2, f"item {request_id}")] if waits else None
        scheduler.add(replace(make_request(request_id, [request_id] * 20, 60, media=media), turn=b"a"))
    for _ in range(2 * count):
        compute(scheduler, scheduler.schedule()[0], encode=not waits)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(("num_blocks", "seqs", "encoder_rows"), [(21, 8, 32), (400, 4, 32), (400, 8, 8)])
def test_who_has_nothing_running_waits_for_no_others_blocks_seats_or_rows(
    num_blocks: int, seqs: int, encoder_rows: int, waits: bool
) -> None:
    """Another tenant holds all blocks, all seats, or all rows that towers may have."""
    scheduler = make_scheduler(num_blocks, seqs=seqs, tokens=40, encoder_rows=encoder_rows, caching=False)
    greedy_tenant(scheduler, 8, waits=waits)
    held = scheduler.num_running
    for request_id in range(11, 14):
        request = make_request(request_id, [9] * 5, 1, media=[(1, 1, f"small {request_id}")], priority=7)
        scheduler.add(replace(request, turn=b"b"))
        for _ in range(2):
            plan = scheduler.schedule()[0]
            for key in plan.encode:
                if key[1].startswith(b"small"):
                    scheduler.encoder.fill(key, key)
            compute(scheduler, plan, encode=False)
        assert request_id not in scheduler._by_id
    assert scheduler.num_running >= held - 1  # what was taken away is what was wanted
    for key in list(scheduler.encoder._entries):
        scheduler.encoder.fill(key, key)
    for _ in range(400):
        step(scheduler)
    assert not scheduler.has_work()


def test_who_does_not_fit_is_not_passed_for_ever() -> None:
    """Short prompts of two other tenants without end: a prompt that needs all blocks has its turn."""
    scheduler = make_scheduler(16, tokens=12, caching=False)
    small = 0

    def come() -> None:
        nonlocal small
        small += 1
        scheduler.add(replace(make_request(small, [1] * 8, 4), turn=b"bc"[small % 2 : small % 2 + 1]))

    come()
    step(scheduler)
    come()
    scheduler.add(replace(make_request(999, [2] * 60, 1), turn=b"a"))
    for _ in range(120):
        step(scheduler)
        while sum(seq.id != 999 for seq in scheduler._by_id.values()) < 2:
            come()
    assert 999 not in scheduler._by_id
    assert small > 20


def test_a_client_s_priority_counts_among_its_own_requests() -> None:
    scheduler = make_scheduler(8, tokens=8, seqs=8, caching=False)
    for request_id in range(1, 7):
        scheduler.add(replace(make_request(request_id, [request_id] * 8, 8, priority=-9), turn=b"a"))
    scheduler.add(replace(make_request(10, [3] * 4, 8), turn=b"b"))
    seq, ended = scheduler._by_id[10], list[int]()
    while 10 not in ended:
        ended += compute(scheduler, scheduler.schedule()[0])
    assert len(ended) <= 3
    assert scheduler.preemptions and not seq.num_preemptions


def test_decodes_come_before_prompts() -> None:
    scheduler = make_scheduler(tokens=6)
    scheduler.add(make_request(1, [1] * 3))
    step(scheduler)
    scheduler.add(make_request(2, [2] * 20))
    plan = step(scheduler)
    assert [seq.id for seq in plan.decodes] == [1]
    assert [(seq.id, count) for seq, count in plan.prefills] == [(2, 5)]


def test_the_youngest_of_the_lowest_priority_gives_way() -> None:
    scheduler = make_scheduler(num_blocks=10, caching=False)
    for request_id, priority in ((1, 0), (2, 5), (3, 5), (4, 0)):
        scheduler.add(make_request(request_id, [request_id] * 4, 20, priority=priority))
    gone: list[int] = []
    for _ in range(12):
        step(scheduler)
        gone += [seq.id for seq in scheduler.waiting if seq.num_outputs and seq.id not in gone]
    assert gone[0] == 3
    assert not {1, 4} & set(gone[:2])


def test_a_preempted_sequence_keeps_what_it_said() -> None:
    scheduler = make_scheduler(caching=False)
    scheduler.add(make_request(1, [1] * 5, 6))
    for _ in range(3):
        step(scheduler)
    [seq] = scheduler.decoding
    scheduler._preempt(seq)
    assert (seq.num_outputs, seq.num_computed, seq.blocks) == (3, 0, [])
    plan = step(scheduler)
    assert [(s.id, count) for s, count in plan.prefills] == [(1, 8)]
    assert seq.num_outputs == 4


def test_prompt_is_cut_where_towers_must_wait() -> None:
    """Two pictures of 4 rows, 6 rows of towers at a time: the pictures wait, the text before each does not."""
    scheduler = make_scheduler(tokens=40, rows=6, encoder_rows=10)
    scheduler.add(make_request(1, [1] * 20, media=[(2, 4, "a"), (9, 4, "b")]))
    seen = []
    for _ in range(3):
        plan = step(scheduler)
        seen.append(([count for _, count in plan.prefills], len(plan.encode)))
    assert seen == [([2], 1), ([7], 1), ([11], 0)]


def test_an_item_above_the_encoder_budget_runs_alone() -> None:
    scheduler = make_scheduler(tokens=40, rows=3, encoder_rows=4)
    scheduler.add(make_request(1, [1] * 20, media=[(2, 14, "large")]))
    assert len(step(scheduler).encode) == 1
    assert [count for _, count in step(scheduler).prefills] == [18]


def test_a_picture_in_a_cached_prefix_is_not_encoded() -> None:
    scheduler = make_scheduler(tokens=40)
    for request_id in (1, 2):
        scheduler.add(make_request(request_id, [1] * 13, 1, media=[(1, 6, "a")]))
        assert len(step(scheduler).encode) == (request_id == 1)
        if request_id == 1:
            step(scheduler)
    assert scheduler.encoder.queries == 1


def test_equal_prefix_waits_but_lets_others_pass() -> None:
    scheduler = make_scheduler(tokens=40)
    for request_id, token in ((1, 1), (2, 1), (3, 3)):
        scheduler.add(make_request(request_id, [token] * 9, 2))
    assert [(s.id, n) for s, n in step(scheduler).prefills] == [(1, 9), (3, 9)]
    assert [(s.id, n) for s, n in step(scheduler).prefills] == [(2, 1)]


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    scheduler = make_scheduler(num_blocks=4, tokens=20)
    scheduler.add(make_request(1, [1] * 13, 1))
    step(scheduler)
    scheduler.add(make_request(2, [2] * 6, 1))  # takes the block without key, and one of the three that have one
    step(scheduler)
    again = Sequence(make_request(3, [1] * 13, 1), 0)
    assert len(scheduler.prefixes.find(again)[0]) == 2


def test_encoder_only_models_take_whole_prompts() -> None:
    """No blocks, no chunks; a prompt above the token budget is computed alone."""
    scheduler = make_scheduler(num_blocks=20, tokens=10, has_cache=False)
    params = PoolingParams("embed")
    for request_id, length in ((1, 6), (2, 6), (3, 30), (4, 2)):
        scheduler.add(EngineRequest(request_id, Prompt(np.ones(length, np.int32)), pooling=params))
    seen = []
    while scheduler.has_work():
        plan, _ = scheduler.schedule()
        seen.append([(seq.id, count) for seq, count in plan.prefills])
        for seq, count in plan.prefills:
            scheduler.advance(seq, count)
            scheduler.finish(seq)
    assert seen == [[(1, 6)], [(2, 6)], [(3, 30)], [(4, 2)]]


@pytest.mark.parametrize(
    "request_",
    [
        EngineRequest(9, Prompt(np.ones(3, np.int32))),
        EngineRequest(9, Prompt(np.ones(3, np.int32)), SamplingParams(1), PoolingParams("embed")),
        EngineRequest(9, Prompt(np.ones(3, np.int32)), pooling=PoolingParams("classify")),
        EngineRequest(1, Prompt(np.ones(3, np.int32)), SamplingParams(1)),
    ],
)
def test_requests_that_make_no_sense_are_refused(request_: EngineRequest) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(1, [1]))
    refusal = scheduler.add(request_)
    assert refusal is not None
    assert refusal.finish_reason == "error"
    assert list(scheduler._by_id) == [1]


@pytest.mark.parametrize(
    ("stop", "max_tokens", "committed", "reason", "kept"),
    [
        ((), 9, [1, 2, 3], None, [7, 1, 2, 3]),
        ((2,), 9, [1, 2, 3], "stop", [7, 1, 2]),
        ((), 3, [1, 2, 3], "length", [7, 1, 2]),
        ((2,), 3, [1, 2, 3], "stop", [7, 1, 2]),
        ((1,), 9, [1], "stop", [7, 1]),
    ],
)
def test_a_list_of_tokens_ends_where_one_of_them_ends_it(
    stop: tuple[int, ...], max_tokens: int, committed: list[int], reason: str | None, kept: list[int]
) -> None:
    scheduler = make_scheduler()
    sampling = SamplingParams(max_tokens, stop_token_ids=stop)
    scheduler.add(replace(make_request(1, [9] * 3), sampling=sampling))
    step(scheduler)
    [seq] = scheduler.decoding
    scheduler.propose = lambda seq, most: [1, 2]
    scheduler._most_drafts = lambda seq: 2  # type: ignore[method-assign]
    scheduler.schedule()
    scheduler.advance(seq, 1)
    assert scheduler.commit(seq, committed) == reason
    assert seq.tokens[seq.num_prompt : seq.num_tokens].tolist() == kept
    assert scheduler.has_work() == (reason is None)
    scheduler.check_integrity()


def test_drafts_take_no_more_than_they_may() -> None:
    """Up to the last token allowed, half of what decodes leave of a step, and only blocks that are free."""
    scheduler = make_scheduler(num_blocks=4, tokens=9)
    scheduler.add(make_request(1, [1] * 3, 13))
    step(scheduler)
    scheduler.propose = lambda seq, most: [7] * 100
    counts = []
    while scheduler.has_work():
        plan = step(scheduler)
        counts.append([count for _, count in plan.work])
    assert counts == [[5], [5], [2]]
    assert scheduler.preemptions == 0


@pytest.mark.parametrize(("num_blocks", "fits"), [(9, False), (12, True)])
@pytest.mark.parametrize("before", [0, 3])
def test_a_media_item_longer_than_a_step_has_blocks_or_is_refused(num_blocks: int, fits: bool, before: int) -> None:
    """Its tokens are computed together, in windows too: those of a lone request must not wait for ever."""
    scheduler = make_scheduler(
        num_blocks, tokens=4, rows=32, encoder_rows=32, windows=(None, 4), keys_at_once=1, media_both_ways=True
    )
    assert scheduler.add(make_request(1, [5] * (before + 20), 1, media=[(before, 20, "wide")])) is None
    failed: list[str] = []
    for _ in range(8):
        plan, ended = scheduler.schedule()
        failed += [output.error for output in ended]
        compute(scheduler, plan)
    assert failed == ([] if fits else [NO_ROOM])
    assert not scheduler.has_work()
    assert scheduler.pool.num_free == num_blocks
