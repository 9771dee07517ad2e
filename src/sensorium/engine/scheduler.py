"""Decides what the next step computes: one decode token for every running sequence, then chunks of prompts.

Owns sequences, blocks and pins, and gives everything back the moment a sequence ends. Tenants take turns; of one tenant
priority decides, and then the first come is the first served. When blocks run out, the tenant that holds most of them
has its most recent sequence of the lowest priority preempted by recomputation; generated tokens are kept. The same
happens where a tenant that has nothing running would have to wait until others end who hold more than their share.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt
from operator import attrgetter, itemgetter
from time import monotonic
from typing import Any, Protocol

from sensorium.engine.admission import refusal
from sensorium.engine.block_pool import BlockPool
from sensorium.engine.constraint import Constraint
from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.prefix_cache import PrefixCache
from sensorium.engine.sequence import ItemKey, Sequence, Status, Wanted
from sensorium.engine.tables import KEYS_AT_ONCE, BlockTables
from sensorium.models.adapters import Adapter
from sensorium.types import EngineOutput, EngineRequest, FinishReason, MediaSpan

MAX_PASSED_OVER = 32  # waiting sequences that may be overtaken in one step while they wait for an equal prefix

NO_ROOM = "A media item of this request does not fit in the KV cache beside the rest of it."

LEAST_CHUNK = 64  # tokens of a long prompt's chunk: with fewer a step reads all weights for next to nothing

Propose = Callable[[Sequence, int], list[int]]
"""(decoding sequence, most tokens) -> a guess at its next tokens, which may be empty."""

_order = attrgetter("order")


class Lookup(Protocol):
    """Guesses what sequences say next (`lookup.PromptLookup`, `drafting.Drafting`)."""

    def begin(self, num_decoding: int) -> None:
        """A step is planned in which so many sequences decode."""

    def propose(self, seq: Sequence, most: int) -> list[int]:
        """See `Propose`."""

    def learn(self, seq: Sequence, drafted: int, right: int) -> None:
        """So many of a sequence's drafts were right."""

    def forget(self, seq: Sequence) -> None:
        """A sequence ends, or gives its cache back."""


@dataclass(slots=True)
class Plan:
    """One step. `decodes` compute one token each; the others are (sequence, number of tokens).

    A drafted sequence computes its last token and the drafts after it, at least two tokens.
    """

    decodes: list[Sequence] = field(default_factory=list)
    drafted: list[tuple[Sequence, int]] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)
    encode: dict[ItemKey, Wanted] = field(default_factory=dict)  # what towers are to compute for later ones
    num_pairs: int = 0  # of prompts' tokens and the tokens that each attends to, at most

    def __bool__(self) -> bool:
        return bool(self.decodes or self.drafted or self.prefills)

    @property
    def chunks(self) -> list[tuple[Sequence, int]]:
        """What computes several tokens, or a prompt's."""
        return [*self.drafted, *self.prefills] if self.drafted else self.prefills

    @property
    def work(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of tokens) of the whole step, in the order of the batch."""
        return [*((seq, 1) for seq in self.decodes), *self.chunks]

    def sequences(self) -> list[Sequence]:
        return [*self.decodes, *(seq for seq, _ in self.chunks)]

    def singles(self) -> list[Plan]:
        """The same step, one sequence at a time."""
        return [
            *(Plan(decodes=[seq]) for seq in self.decodes),
            *(Plan(drafted=[one]) for one in self.drafted),
            *(Plan(prefills=[one]) for one in self.prefills),
        ]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a step may hold. `max_model_len` tokens always fit in the blocks (`EngineReady.kv_tokens`)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_encoder_rows: int
    max_model_len: int
    block_size: int
    has_cache: bool = True  # False for encoder-only models: a prompt is computed whole and keeps nothing
    axes: int = 1  # of positions; 3 for M-RoPE
    generates: bool = True  # whether the model has a language head
    long_context_from: int | None = None  # see `Model`: longer sequences are computed anew, in another way
    attends_to_media: bool = False  # see `models.cache`
    max_pairs: int | None = None  # of a step's prompt tokens and the tokens that each attends to
    media_both_ways: bool = False  # see `Model`: the tokens of a media span are computed in one step
    windows: tuple[int | None, ...] = (None,)  # of a sequence's block tables, see `BlockTables`
    keys_at_once: int = KEYS_AT_ONCE

    def tables(self) -> BlockTables:
        windows = self.windows if self.has_cache else ()
        return BlockTables(windows, self.block_size, self.max_num_batched_tokens, self.keys_at_once)


@dataclass(slots=True)
class _Tenant:
    """What a tenant has had, in a count that only compares tenants who are here at the same time."""

    prompt_tokens: int
    sequences: int = 0
    num_running: int = 0


class Scheduler:
    def __init__(
        self,
        budget: Budget,
        pool: BlockPool,
        prefixes: PrefixCache,
        encoder: EncoderCache[Any],
        pooling: Mapping[str, bool] | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        """`pooling`: the pooling tasks that the model can do, and whether each needs every token's hidden state.
        `lookup` guesses tokens."""
        self.budget = budget
        self.tables = budget.tables()
        self._has_windows = self.tables.has_windows
        self._has_states = prefixes.states is not None
        self.pool = pool
        self.prefixes = prefixes
        self.encoder = encoder
        self.waiting: list[Sequence] = []  # by order
        self.prefilling: list[Sequence] = []  # by order
        self.decoding: list[Sequence] = []
        self.preemptions = 0
        self._by_id: dict[int, Sequence] = {}
        self._tenants: dict[bytes, _Tenant] = {}  # those who have sequences
        self._arrivals = 0
        self._max_seqs = min(budget.max_num_seqs, budget.max_num_batched_tokens)
        if prefixes.states is not None:
            self._max_seqs = min(self._max_seqs, prefixes.states.max_running)
        self._free_slots = list(range(self._max_seqs - 1, -1, -1))  # of the batch tables
        self._pooling = dict(pooling or {})
        self._lookup = lookup
        self.propose: Propose | None = None if lookup is None else lookup.propose  # asked for drafts, if set
        self._lacking: Sequence | None = None  # what could not go on for want of blocks in this step

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def has_work(self) -> bool:
        return bool(self._by_id)

    # Requests come and go

    def add(
        self, request: EngineRequest, constraint: Constraint | None = None, adapter: Adapter | None = None
    ) -> EngineOutput | None:
        """Queue a request, or say why it can never run. `constraint` is what its grammar was compiled to."""
        if reason := self._refusal(request):
            return EngineOutput(request.id, finish_reason="error", error=reason)
        seq = Sequence(request, self._arrivals, constraint)
        seq.adapter = adapter
        if constraint is not None and self.propose is None:
            self.propose = known_tokens
        seq.is_long = self._is_long(seq)
        if request.pooling is not None:
            seq.reuse = not any(self._pooling[task] for task in request.pooling.tasks)
        self._arrivals += 1
        self._by_id[seq.id] = seq
        if request.turn not in self._tenants:  # whoever comes now has had as much as who had least
            least = min((one.prompt_tokens for one in self._tenants.values()), default=0)
            self._tenants[request.turn] = _Tenant(least)
        self._tenants[request.turn].sequences += 1
        insort(self.waiting, seq, key=_order)
        return None

    def _refusal(self, request: EngineRequest) -> str:
        if request.id in self._by_id:
            return "The request's number is in use."
        budget = self.budget
        return refusal(
            request,
            max_model_len=budget.max_model_len,
            axes=budget.axes,
            generates=budget.generates,
            pooling=self._pooling,
            attends_to_media=budget.attends_to_media,
        )

    def abort(self, request_id: int) -> bool:
        """Forget a request wherever it is. False if it is unknown or has ended."""
        seq = self._by_id.get(request_id)
        if seq is None:
            return False
        self._end(seq)
        return True

    def fail(self, seq: Sequence, error: str) -> EngineOutput:
        """End a sequence whose step failed; nothing that it computed is reused."""
        self.prefixes.forget(seq)
        self._end(seq)
        return EngineOutput(seq.id, finish_reason="error", error=error)

    def finish(self, seq: Sequence) -> None:
        self._end(seq)

    # One step

    def schedule(self) -> tuple[Plan, list[EngineOutput]]:
        """The next step, and outputs of sequences that had to end without one."""
        plan, ended = self._plan()
        for _ in range(self.num_running - 1):  # where all wait for each other's blocks, the last lets go of its own
            if plan or plan.encode or self._lacking is None or self._lacking.status is not Status.PREFILLING:
                break
            self._preempt(max(self.prefilling, key=_order))
            plan, more = self._plan()
            ended += more
        lacking = None if plan or plan.encode else self._lacking
        if lacking is not None and self.num_running == (lacking.status is Status.PREFILLING):  # alone
            ended.append(self.fail(lacking, NO_ROOM))
        if self.prefixes.states is not None:
            self.prefixes.states.prepare((seq, count, self.prefixes.snapshots(seq, count)) for seq, count in plan.work)
        return plan, ended

    def foreseen(self, plan: Plan) -> list[Sequence]:
        """What decodes in the step after `plan`, which is being computed, if each of its sequences gets one token, none
        ends, and nobody comes. They have blocks for it. [] where that will not be so, or is not all of that step."""
        coming = [*plan.decodes, *(seq for seq, _ in plan.prefills)]
        if self.waiting or plan.drafted or len(coming) != self.num_running:
            return []
        border = self.budget.long_context_from
        for seq, count in plan.work:
            if (
                seq.num_computed + count < seq.num_tokens
                or seq.num_outputs + 1 >= seq.max_tokens
                or (border is not None and not seq.is_long and seq.num_tokens >= border)
            ):
                return []
        size, num_tables = self.budget.block_size, len(self.tables.windows)
        needy = [seq for seq in coming if any(len(blocks) * size <= seq.num_tokens for blocks in seq.blocks)]
        if len(needy) * num_tables > self.pool.num_free:
            return []
        for seq in needy:
            self._secure(seq, seq.num_tokens + 1)
        return coming

    def _plan(self) -> tuple[Plan, list[EngineOutput]]:
        plan = Plan()
        self._lacking = None
        if len(self._tenants) > 1 and self.waiting:
            self._make_room()
        ended = self._secure_decode_blocks() if self.decoding else []
        tokens = self.budget.max_num_batched_tokens - len(self.decoding)
        if self.propose is None:
            plan.decodes = list(self.decoding)
        else:
            tokens -= self._plan_drafts(plan, self.propose, tokens // 2)  # prompts keep the other half
        if len(self._tenants) > 1 and self.waiting and self.prefilling:
            tokens = self._let_in_first(plan, tokens)
        for seq in self._in_turn(self.prefilling):
            if tokens <= 0:
                break
            if all(seq is not planned for planned, _ in plan.prefills):
                tokens -= self._plan_chunk(plan, seq, tokens)
        if self.waiting and tokens > 0 and self._free_slots:
            self._admit(plan, tokens, self._in_turn(self.waiting))
        return plan, ended

    def _in_turn(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those first whose tenant has had fewest prompt tokens computed, and of equals who has nothing running; of one
        tenant by priority, which is a client's word, and arrival."""
        if len(self._tenants) <= 1:
            return list(sequences)
        return sorted(sequences, key=self._turn)

    def _turn(self, seq: Sequence) -> tuple[int, bool, int, int]:
        tenant = self._tenants[seq.request.turn]
        return tenant.prompt_tokens, tenant.num_running > 0, *seq.order

    def _make_room(self) -> None:
        """Preempt for the first sequence of every tenant that has none running, as long as it is within its share."""
        first = {
            seq.request.turn: seq for seq in reversed(self.waiting) if not self._tenants[seq.request.turn].num_running
        }
        for seq in first.values():
            if self._blocks_wanted(seq) * len(self._tenants) > self.pool.num_blocks:
                continue
            while not self._has_place(seq) and (victim := self._greediest()) is not None:
                self._preempt(victim)

    def _has_place(self, seq: Sequence) -> bool:
        spare = self.num_running * len(self.tables.windows)
        return bool(self._free_slots) and self.pool.num_free >= self._blocks_wanted(seq) + spare

    def _blocks_wanted(self, seq: Sequence) -> int:
        """Of a waiting sequence, if none of them is found."""
        if not self.budget.has_cache:
            return 0
        return sum(self.tables.end(window, 0, seq.num_tokens) for window in self.tables.windows)

    def _held(self) -> Counter[bytes]:
        """Blocks of each tenant; shared ones count for each sequence."""
        held: Counter[bytes] = Counter()
        for seq in (*self.decoding, *self.prefilling):
            held[seq.request.turn] += sum(map(len, seq.blocks)) - sum(seq.num_released)
        return held

    def _greediest(self) -> Sequence | None:
        """The last sequence of the tenant with most blocks (or seats) if that is more than its share; never its only
        one."""
        held, share = self._held(), 1 / len(self._tenants)
        for turn, blocks in held.most_common():
            running = self._tenants[turn].num_running
            is_greedy = blocks > share * self.pool.num_blocks or running > share * self._max_seqs
            if is_greedy and running > 1:
                return self._last_of(turn)
        return None

    def _last_of(self, turn: bytes) -> Sequence:
        return max((seq for seq in (*self.decoding, *self.prefilling) if seq.request.turn == turn), key=_order)

    def _let_in_first(self, plan: Plan, tokens: int) -> int:
        """Start waiting sequences whose turn comes before that of all running prompts; returns the tokens left."""
        first = min(map(self._turn, self.prefilling))
        return self._admit(plan, tokens, [seq for seq in self._in_turn(self.waiting) if self._turn(seq) < first])

    def _secure_decode_blocks(self) -> list[EngineOutput]:
        """Give a block to every decode that has filled its last one, preempting where there are none left."""
        size = self.budget.block_size
        needy = [seq for seq in self.decoding if seq.num_computed == len(seq.blocks[0]) * size]
        ended = []
        while len(needy) * len(self.tables.windows) > self.pool.num_free:
            victim = self._last_of(max(self._held().items(), key=itemgetter(1))[0])
            if self.num_running == 1:  # alone, and still too large: admission should have seen it
                self._end(victim)
                ended.append(EngineOutput(victim.id, finish_reason="length"))
            else:
                self._preempt(victim)
            needy = [seq for seq in needy if seq.status is Status.DECODING]
        for seq in needy:
            self._secure(seq, seq.num_computed + 1)
        return ended

    def _plan_drafts(self, plan: Plan, propose: Propose, tokens: int) -> int:
        """Plan all decodes, with at most `tokens` drafts between them; returns the number of drafts."""
        total = 0
        if self._lookup is not None:
            self._lookup.begin(len(self.decoding))
        for seq in self.decoding:
            seq.drafts = propose(seq, tokens - total) if total < tokens else []
            if seq.drafts:
                seq.drafts = seq.drafts[: max(min(tokens - total, self._most_drafts(seq)), 0)]
            if seq.drafts:
                total += len(seq.drafts)
                plan.drafted.append((seq, 1 + len(seq.drafts)))
                self._secure(seq, seq.num_tokens + len(seq.drafts))
            else:
                plan.decodes.append(seq)
        return total

    def _most_drafts(self, seq: Sequence) -> int:
        """Drafts that may be of use: up to the last token allowed, in free blocks, this side of the long context."""
        most = seq.max_tokens - seq.num_outputs - 1
        border = self.budget.long_context_from
        if border is not None and not seq.is_long:
            most = min(most, border - seq.num_tokens)
        room = (len(seq.blocks[0]) + self.pool.num_free // len(seq.blocks)) * self.budget.block_size
        return min(most, room - seq.num_tokens)

    def _secure(self, seq: Sequence, num_tokens: int) -> None:
        """Blocks for so many tokens; they must be free."""
        for blocks in seq.blocks:
            while len(blocks) * self.budget.block_size < num_tokens:
                blocks.append(self.pool.allocate())

    def _release_unseen(self, seq: Sequence) -> None:
        """Give back the blocks that no token from the next one on sees."""
        for table, window in enumerate(self.tables.windows):
            first = self.tables.first(window, seq.num_computed)
            for block in seq.blocks[table][seq.num_released[table] : first]:
                self.pool.release(block)
            seq.num_released[table] = max(first, seq.num_released[table])

    def _move_windows(self, seq: Sequence, count: int) -> int:
        """Let a prompt's windows go on to its next tokens; returns for how many of the next `count` there are blocks.

        It takes no more blocks than it gives back, but those may be others' as well, who keep them; and a media item
        that is longer than a step takes more.
        """
        self._release_unseen(seq)
        wanted = count
        for blocks, window in zip(seq.blocks, self.tables.windows, strict=True):
            end = self.tables.end(window, seq.num_computed, seq.num_tokens)
            end = max(end, self.tables.blocks(seq.num_computed + wanted))
            while len(blocks) < end and self.pool.num_free:
                blocks.append(self.pool.allocate())
            count = min(count, len(blocks) * self.budget.block_size - seq.num_computed)
        if count < wanted and self.budget.media_both_ways:
            count = _at_span_border(seq, count, most=count)
        if not count:
            self._lacking = seq
        return count

    def _admit(self, plan: Plan, tokens: int, waiting: list[Sequence]) -> int:
        """Start waiting sequences as long as seats, blocks and tokens last; returns the tokens left.

        Where a tenant's next one does not fit, others go on within their share, for as long as it is theirs."""
        coming = self._coming_keys()
        passed_over = 0
        stuck: dict[bytes, Sequence] = {}
        for seq in self._able(waiting, stuck):
            if not self._free_slots or tokens <= 0 or passed_over > MAX_PASSED_OVER:
                break
            found = self.prefixes.find(seq)
            num_found = len(found[0]) if found else 0
            key = self.prefixes.next_key(seq, num_found)
            if key is not None and key in coming:  # another sequence computes this very block now
                passed_over += 1
                continue
            if not self._take_blocks(seq, found):
                stuck[seq.request.turn] = seq
                continue
            if self.budget.has_cache:
                seq.num_computed = num_found * self.budget.block_size
                seq.num_published = num_found
            if self.prefixes.states is not None:
                self.prefixes.states.start(seq, self.prefixes.state_after(seq, num_found))
            chunk = self._plan_chunk(plan, seq, tokens)
            if not chunk and not seq.pinned:
                self._give_back(seq)
                if not seq.item_keys:
                    break
                stuck[seq.request.turn] = seq
                continue
            for other in stuck.values():
                other.passed_tokens += seq.num_tokens
            if key is not None:
                coming.add(key)
            self.waiting.remove(seq)
            self._start(seq, num_found)
            tokens -= chunk
        return tokens

    def _able(self, waiting: list[Sequence], stuck: dict[bytes, Sequence]) -> Iterator[Sequence]:
        """Those that do not come after one which is, or may not pass one which is, `stuck` by the time they are met."""
        for seq in waiting:
            if len(stuck) == len(self._tenants):
                return
            if seq.request.turn in stuck:
                continue
            if stuck and not self._may_pass(seq, stuck):
                stuck[seq.request.turn] = seq
                continue
            yield seq

    def _may_pass(self, seq: Sequence, stuck: Mapping[bytes, Sequence]) -> bool:
        """Whether it may start before other tenants' sequences that do not fit: within its tenant's share, and past one
        that has nothing running only until those that passed have had as many tokens."""
        held = self._held()[seq.request.turn] + self._blocks_wanted(seq)
        return held * len(self._tenants) <= self.pool.num_blocks and all(
            self._tenants[turn].num_running or other.passed_tokens < other.num_tokens for turn, other in stuck.items()
        )

    def _coming_keys(self) -> set[bytes]:
        """The next blocks that running prefills will fill."""
        keys = (self.prefixes.next_key(seq, seq.num_published) for seq in self.prefilling)
        return {key for key in keys if key is not None}

    def _take_blocks(self, seq: Sequence, found: list[list[int]]) -> bool:
        """Blocks for all tokens so far, of windows for the first of them. One of each table stays free for every
        running sequence: nobody is to be preempted at once."""
        if not self.budget.has_cache:
            return True
        computed = len(found[0]) * self.budget.block_size
        missing = sum(self.tables.end(window, computed, seq.num_tokens) for window in self.tables.windows)
        missing -= sum(map(len, found))
        first = [self.tables.first(window, computed) for window in self.tables.windows]
        seen = [block for blocks, start in zip(found, first, strict=True) for block in blocks[start:]]
        spare = self.num_running * len(found)
        if self.pool.num_free < missing + sum(map(self.pool.is_free, seen)) + spare:
            return False
        for block in seen:
            self.pool.retain(block)
        seq.blocks, seq.num_released = found, first
        for blocks, window in zip(found, self.tables.windows, strict=True):
            while len(blocks) < self.tables.end(window, computed, seq.num_tokens):
                blocks.append(self.pool.allocate())
        return True

    def _start(self, seq: Sequence, num_found: int) -> None:
        seq.status = Status.PREFILLING
        seq.slot = self._free_slots.pop()
        self._tenants[seq.request.turn].num_running += 1
        insort(self.prefilling, seq, key=_order)
        if seq.cached_tokens < 0:
            seq.started_s = monotonic()
            seq.cached_tokens = num_found * self.budget.block_size
            self.prefixes.count(seq, num_found)

    def _plan_chunk(self, plan: Plan, seq: Sequence, tokens: int) -> int:
        """Plan at most `tokens` tokens of a prompt; fewer, or none, where tower outputs cannot be had in this step."""
        remaining = seq.num_tokens - seq.num_computed
        count = min(remaining, tokens)
        if not self.budget.has_cache:  # whole, or alone
            count = remaining if remaining <= tokens or not plan else 0
        elif self.budget.max_pairs is not None:
            count = min(count, self._attended(plan, seq, self.budget.max_pairs))
        if self.budget.media_both_ways and seq.item_keys and count:
            count = _at_span_border(seq, count, most=remaining if not plan.prefills else tokens)
        if self._has_windows and count:
            count = self._move_windows(seq, count)
        if seq.item_keys and count:
            count = self._secure_media(plan, seq, count)
        if seq.memories and count and not self._secure_memories(plan, seq):
            count = 0
        if count:
            plan.prefills.append((seq, count))
            plan.num_pairs += count * (seq.num_computed + count)
            self._tenants[seq.request.turn].prompt_tokens += count
        return count

    def _attended(self, plan: Plan, seq: Sequence, max_pairs: int) -> int:
        """Most next tokens of a prompt that keep the step within its pairs; a step's first chunk has a few anyway."""
        before = seq.num_computed
        most = (isqrt(before * before + 4 * max(max_pairs - plan.num_pairs, 0)) - before) // 2
        return most if plan.prefills else max(most, LEAST_CHUNK)

    def _secure_media(self, plan: Plan, seq: Sequence, count: int) -> int:
        """Pin or plan the tower outputs of the next `count` tokens; returns how many can be computed now."""
        start = seq.num_computed
        ready = count
        for span in spans_within(seq, start, start + count):
            is_pinned = span.item in seq.pinned or self._secure_item(plan, seq, span.item)
            if not is_pinned or self.encoder.is_awaited(seq.item_keys[span.item]):
                ready = min(ready, max(span.offset - start, 0) if self.budget.has_cache else 0)
            if not is_pinned:
                break
        return ready

    def _secure_memories(self, plan: Plan, seq: Sequence) -> bool:
        """Whether all that each token attends to is there; what is not is pinned or planned."""
        for item in seq.memories:
            if item not in seq.pinned and not self._secure_item(plan, seq, item):
                return False
        return not any(self.encoder.is_awaited(seq.item_keys[item]) for item in seq.memories)

    def _secure_item(self, plan: Plan, seq: Sequence, item: int) -> bool:
        """Hold an item's tower output, or have it computed. False if that must wait."""
        key = seq.item_keys[item]
        if not self.encoder.pin(key):
            features = seq.request.prompt.media[item]
            planned = sum(one.features.num_rows for one in plan.encode.values())
            if plan.encode and planned + features.num_rows > self.budget.max_encoder_rows:
                return False
            if not self.encoder.reserve(key, features.num_rows, seq.request.turn):
                return False
            plan.encode[key] = Wanted(seq.request.turn, features)
        seq.pinned[item] = None
        return True

    # After the step

    def drop_failed_items(self, failed: Iterable[ItemKey], error: str) -> list[EngineOutput]:
        """Fail the sequences that wait for tower outputs which could not be computed."""
        keys = set(failed)
        return [
            self.fail(seq, error)
            for seq in list(self.prefilling)
            if any(seq.item_keys[item] in keys for item in seq.pinned)
        ]

    def advance(self, seq: Sequence, count: int) -> bool:
        """`count` more of a sequence's tokens are computed. True if all are: the step gave it its next tokens."""
        computed = seq.num_computed = seq.num_computed + count
        if computed >= (seq.num_published + 1) * self.budget.block_size:
            self._publish(seq)
        if self._has_states and not seq.drafts:
            self.prefixes.advance_state(seq)
        if seq.pinned:
            self._unpin(seq, computed)
        if computed < seq.num_tokens:
            return False
        if seq.status is Status.PREFILLING:
            self.prefilling.remove(seq)
            self.decoding.append(seq)
            seq.status = Status.DECODING
        if self._has_windows:
            self._release_unseen(seq)
        return True

    def _publish(self, seq: Sequence) -> None:
        if self.budget.has_cache and seq.num_computed // self.budget.block_size > seq.num_published:
            self.prefixes.publish(seq)

    def commit(self, seq: Sequence, token_ids: Iterable[int]) -> FinishReason | None:
        """The next tokens of an advanced sequence; all but the last were drafts, so that they are computed already.

        It ends at a token that says so, completes its grammar or is the last allowed; those after it are dropped.
        """
        reason: FinishReason | None = None
        before = seq.num_tokens
        for token_id in token_ids:
            seq.append(token_id)
            if token_id in seq.stop_ids or (seq.constraint and seq.constraint.is_complete(seq.num_outputs)):
                reason = "stop"
            elif seq.num_tokens - seq.num_prompt >= seq.max_tokens:
                reason = "length"
            if reason is not None:
                break
        has_state = not seq.drafts or self._take_drafts(seq, seq.num_tokens - before - 1)
        if reason is not None:
            self._end(seq)
        elif not has_state:
            self._requeue(seq)
        elif not seq.is_long and self._is_long(seq):
            seq.is_long = True
            seq.block_keys.clear()
            self._requeue(seq)
        return reason

    def _take_drafts(self, seq: Sequence, right: int) -> bool:
        """So many of a sequence's drafts were right. False where a state is of all of them, and not of those alone."""
        if self._lookup is not None:
            self._lookup.learn(seq, len(seq.drafts), right)
        is_whole = right == len(seq.drafts)
        seq.drafts = []
        seq.num_computed = seq.num_tokens - 1
        self._publish(seq)
        if self._has_windows:
            self._release_unseen(seq)
        if not self._has_states:
            return True
        if is_whole:
            self.prefixes.advance_state(seq)
        return is_whole

    def _is_long(self, seq: Sequence) -> bool:
        border = self.budget.long_context_from
        return border is not None and seq.num_tokens > border

    # Giving back

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue: its tokens stay, its cache is computed again (or found) when there is room."""
        self.preemptions += 1
        seq.num_preemptions += 1
        self._requeue(seq)

    def _requeue(self, seq: Sequence) -> None:
        self._leave(seq)
        self._give_back(seq)
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_order)

    def _end(self, seq: Sequence) -> None:
        del self._by_id[seq.id]
        self._leave(seq)
        tenant = self._tenants[seq.request.turn]
        tenant.sequences -= 1
        if not tenant.sequences:
            del self._tenants[seq.request.turn]
        self._give_back(seq)
        seq.status = Status.DONE

    def _leave(self, seq: Sequence) -> None:
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
            return
        (self.decoding if seq.status is Status.DECODING else self.prefilling).remove(seq)
        self._free_slots.append(seq.slot)
        self._tenants[seq.request.turn].num_running -= 1
        seq.slot = -1

    def _give_back(self, seq: Sequence) -> None:
        for blocks, first in zip(seq.blocks, seq.num_released, strict=True):
            for block in reversed(blocks[first:]):  # the end of a prefix is forgotten before its beginning
                self.pool.release(block)
        if self.prefixes.states is not None:
            self.prefixes.states.give_back(seq)
        if self._lookup is not None:
            self._lookup.forget(seq)
        seq.blocks, seq.num_released = [], []
        seq.num_computed = 0
        seq.num_published = 0
        seq.drafts = []
        self._unpin(seq, None)
        seq.hidden.clear()

    def _unpin(self, seq: Sequence, computed: int | None) -> None:
        """Let go of the items whose last row is computed; of all with None."""
        done = [item for item in seq.pinned if computed is None or seq.item_ends[item] <= computed]
        for item in done:
            del seq.pinned[item]
            self.encoder.unpin(seq.item_keys[item])

    def check_integrity(self) -> None:
        """Blocks and pins are exactly those that living sequences hold."""
        self.pool.check_integrity()
        if self.prefixes.states is not None:
            self.prefixes.states.pool.check_integrity()
        self.encoder.check_integrity()


def known_tokens(seq: Sequence, most: int) -> list[int]:
    """The next tokens where a grammar leaves no choice."""
    return [] if seq.constraint is None else seq.constraint.drafts(seq.num_outputs)[:most]


def _at_span_border(seq: Sequence, count: int, most: int) -> int:
    """The next `count` tokens, or fewer, that end in no media span. A span that is next and is longer is taken whole if
    `most` allows; else there are none."""
    end = seq.num_computed + count
    for span in spans_within(seq, end - 1, end):
        last = span.offset + span.length
        if last <= end:
            return count
        if span.offset > seq.num_computed:
            return span.offset - seq.num_computed
        return last - seq.num_computed if last - seq.num_computed <= most else 0
    return count


def spans_within(seq: Sequence, start: int, end: int) -> Iterable[MediaSpan]:
    """Spans of media rows that overlap tokens [start, end)."""
    for span in seq.request.prompt.spans:
        if span.offset >= end:
            return
        if span.offset + span.length > start:
            yield span
