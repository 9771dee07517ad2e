"""Which KV blocks already hold the beginning of a sequence: a chain of sha256 over everything that they depend on.

A block's key covers its parent's key, its token ids, the media rows that stand in it and positions other than
0, 1, 2, …; the chain starts from model identity and tenant salt. Every part is framed by its length, so that no two
inputs give the same bytes. Python's `hash` plays no part.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable
from hashlib import sha256

import numpy as np

from sensorium.engine.block_pool import BlockPool
from sensorium.engine.sequence import Sequence
from sensorium.engine.state_slots import ZERO_SLOT, StateSlots
from sensorium.engine.tables import BlockTables

_LENGTH = struct.Struct("<I")
_SPAN = struct.Struct("<IIQI")  # offset in the block, tokens, first row, bytes of the key


def root_key(
    identity: bytes,
    salt: bytes,
    *,
    is_long: bool = False,
    stretched: int = 0,
    memories: Iterable[bytes] = (),
    adapter: bytes = b"",
) -> bytes:
    """Parent of every first block of one model, tenant and kind of rotary frequencies. `stretched`: the prompt's length
    where frequencies depend on it. `memories`: keys of the media that all tokens attend to. `adapter`: digest of
    what the layers are adapted by."""
    parts = (
        _LENGTH.pack(len(identity)),
        identity,
        _LENGTH.pack(len(salt)),
        salt,
        bytes([is_long]),
        _LENGTH.pack(stretched),
        _LENGTH.pack(len(adapter)),
        adapter,
        *(part for key in memories for part in (_LENGTH.pack(len(key)), key)),
    )
    return sha256(b"".join(parts)).digest()


def block_key(parent: bytes, token_ids: bytes, spans: list[tuple[int, int, int, bytes]], positions: bytes) -> bytes:
    """`token_ids` and `positions` as raw integers; `spans` as (offset in the block, tokens, first row, media key)."""
    parts = [parent, _LENGTH.pack(len(token_ids)), token_ids, _LENGTH.pack(len(spans))]
    for offset, length, row, key in spans:
        parts.append(_SPAN.pack(offset, length, row, len(key)))
        parts.append(key)
    parts.append(_LENGTH.pack(len(positions)))
    parts.append(positions)
    return sha256(b"".join(parts)).digest()


class PrefixCache:
    """Finds and publishes the blocks of sequences. `enabled=False` makes it find and publish nothing."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        identity: bytes,
        *,
        enabled: bool = True,
        stretched_from: int | None = None,
        states: StateSlots | None = None,
    ) -> None:
        """`stretched_from`: see `Model`; `states`: of models whose layers keep some."""
        self.pool = pool
        self.states = states
        self._tables = tables
        self._block_size = tables.block_size
        self._identity = identity
        self._enabled = enabled
        self._stretched_from = stretched_from
        self.queries = 0  # tokens
        self.hits = 0  # tokens

    def find(self, seq: Sequence) -> list[list[int]]:
        """Leading blocks of `seq` that are in the cache, as many of each table; the last token is left to compute.
        Retains nothing. Of tables with a window only the blocks that the next token sees must be there: those before
        them are any numbers. Layers with states must have a snapshot after the last of them."""
        count = (seq.num_tokens - 1) // self._block_size if self._enabled and seq.reuse else 0
        held: list[list[int | None]] = []
        for table, window in enumerate(self._tables.windows):
            held.append(self._held(seq, table, count, leading=window is None))
            count = min(count, len(held[-1]))
        seq.branch = count * self._block_size
        while missing := self._last_missing(held, count) or self._last_without_state(seq, count):
            count = missing - 1
        return [[block or 0 for block in blocks[:count]] for blocks in held]

    def _held(self, seq: Sequence, table: int, count: int, *, leading: bool) -> list[int | None]:
        """The first `count` blocks of a table as far as they are there, with `leading` up to one that is not."""
        found: list[int | None] = []
        for index in range(count):
            block = self.pool.find(_of_table(self.key(seq, index), table))
            if block is None and leading:
                break
            found.append(block)
        return found

    def _last_missing(self, held: list[list[int | None]], count: int) -> int:
        """Of the blocks that a token after `count` of them sees, one more than the last that is missing; 0: none is."""
        for window, blocks in zip(self._tables.windows, held, strict=True):
            first = self._tables.first(window, count * self._block_size)
            for index in range(count - 1, first - 1, -1):
                if blocks[index] is None:
                    return index + 1
        return 0

    def _last_without_state(self, seq: Sequence, count: int) -> int:
        """`count` where there is no snapshot after so many blocks, else 0."""
        return 0 if self.states is None or not count or self.state_after(seq, count) else count

    def state_after(self, seq: Sequence, count: int) -> int:
        """Slot of the snapshot after so many blocks; that of zeros after none, and where there is no snapshot."""
        if self.states is None or not count:
            return ZERO_SLOT
        return self.states.find(self.key(seq, count - 1)) or ZERO_SLOT

    def snapshots(self, seq: Sequence, count: int) -> list[int]:
        """Places between the next `count` tokens where a snapshot is of use: at the last border of blocks, and where
        other prompts went on differently."""
        if self.states is None or not self._enabled:
            return []
        start, end = seq.num_computed, seq.num_computed + count
        places = {min(end, seq.num_tokens - 1) // self._block_size * self._block_size, seq.branch}
        return sorted(
            place for place in places if start < place < end and not self.state_after(seq, place // self._block_size)
        )

    def advance_state(self, seq: Sequence) -> None:
        """A step of a model with states is computed: `seq` has another state, and its snapshots can be found."""
        if self.states is not None:
            self.states.advance(seq, lambda place, slot: self._publish_state(seq, place, slot))

    def _publish_state(self, seq: Sequence, place: int, slot: int) -> None:
        if self.states is None or not self._enabled or place % self._block_size:
            return
        key = self.key(seq, place // self._block_size - 1)
        self.states.pool.publish(slot, key)
        if place > seq.num_prompt:  # of a completion only the last one is kept
            self.states.forget(seq.snapshot)
            seq.snapshot = key

    def next_key(self, seq: Sequence, index: int) -> bytes | None:
        """Key of block `index` if it is one that `find` could return, else None."""
        if self._enabled and seq.reuse and index < (seq.num_tokens - 1) // self._block_size:
            return self.key(seq, index)
        return None

    def count(self, seq: Sequence, num_found: int) -> None:
        if self._enabled and seq.reuse:
            self.queries += seq.num_tokens
            self.hits += num_found * self._block_size

    def publish(self, seq: Sequence) -> None:
        """Make the blocks findable that `seq` has filled since the last call."""
        full = seq.num_computed // self._block_size
        if self._enabled:
            for index in range(seq.num_published, full):
                key = self.key(seq, index)
                for table, blocks in enumerate(seq.blocks):
                    self.pool.publish(blocks[index], _of_table(key, table))
        seq.num_published = full

    def forget(self, seq: Sequence) -> None:
        """Nothing that this sequence used is to be found again: it may hold what a failed step wrote."""
        for blocks, first in zip(seq.blocks, seq.num_released, strict=True):
            for block in blocks[first:]:
                self.pool.forget(block)
        if self.states is not None:
            for key in seq.block_keys:
                self.states.forget(key)

    def key(self, seq: Sequence, index: int) -> bytes:
        """Key of the full block `index`; those before it are computed once and kept."""
        keys = seq.block_keys
        if not keys and index >= 0:
            border = self._stretched_from
            stretched = seq.num_prompt if border is not None and seq.num_prompt > border else 0
            root = root_key(
                self._identity,
                seq.request.salt,
                is_long=seq.is_long,
                stretched=stretched,
                memories=[seq.item_keys[item][1] for item in seq.memories],
                adapter=b"" if seq.adapter is None else seq.adapter.digest,
            )
            keys.append(self._extend(seq, root, 0))
        while len(keys) <= index:
            keys.append(self._extend(seq, keys[-1], len(keys)))
        return keys[index]

    def _extend(self, seq: Sequence, parent: bytes, index: int) -> bytes:
        start = index * self._block_size
        end = start + self._block_size
        positions = b""
        if end > seq.plain_until and (seq.delta or seq.plain_until < seq.num_prompt):
            positions = _positions(seq, start, end)
        spans = _overlaps(seq, start, end) if seq.span_offsets else []
        return block_key(parent, seq.tokens[start:end].astype("<i4", copy=False).tobytes(), spans, positions)


def _of_table(key: bytes, table: int) -> bytes:
    return key + bytes([table]) if table else key


def _positions(seq: Sequence, start: int, end: int) -> bytes:
    """The same bytes whether a token was generated or came back as part of a longer prompt."""
    positions = seq.positions(start, end)
    explicit = seq.request.prompt.positions
    if explicit is not None:
        positions = np.broadcast_to(positions, (len(explicit), end - start))
    return positions.astype("<i4" if (positions == np.rint(positions)).all() else "<f4").tobytes()


def _overlaps(seq: Sequence, start: int, end: int) -> list[tuple[int, int, int, bytes]]:
    out = []
    spans = seq.request.prompt.spans
    for span in spans[max(bisect_right(seq.span_offsets, start) - 1, 0) :]:
        if span.offset >= end:
            break
        first, last = max(span.offset, start), min(span.offset + span.length, end)
        if first < last:
            out.append((first - start, last - first, span.row + first - span.offset, seq.item_keys[span.item][1]))
    return out
