"""Outputs of the media towers by content, within a byte budget; least recently used go first, pinned ones never.

A sequence pins an item from when the tower runs (or the item is found) until all its rows are in the KV cache. An entry
may be reserved before its rows exist. What one tenant has reserved and is pinned leaves `OTHERS_PART` of the budget to
others. Rows are opaque here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Generic, TypeVar

from sensorium.engine.sequence import ItemKey

Rows = TypeVar("Rows")
OTHERS_PART = 0.125


class _Entry(Generic[Rows]):
    __slots__ = ("pins", "rows", "size_bytes", "turn")

    def __init__(self, size_bytes: int, turn: bytes) -> None:
        self.rows: Rows | None = None
        self.size_bytes = size_bytes
        self.turn = turn  # who reserved it
        self.pins = 1


class EncoderCache(Generic[Rows]):
    def __init__(self, budget_bytes: int, row_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._tenant_bytes = budget_bytes - int(budget_bytes * OTHERS_PART)
        self._pinned: Counter[bytes] = Counter()  # bytes, by who reserved them
        self._row_bytes = row_bytes
        self._entries: OrderedDict[ItemKey, _Entry[Rows]] = OrderedDict()  # least recently used first
        self.size_bytes = 0
        self.pinned_bytes = 0
        self.queries = 0
        self.hits = 0

    def __contains__(self, key: ItemKey) -> bool:
        return key in self._entries

    def pin(self, key: ItemKey) -> bool:
        """Hold an entry that is there (or reserved). False if it is not."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self.queries += 1
        self.hits += 1
        if not entry.pins:
            self._count_pinned(entry, 1)
        entry.pins += 1
        self._entries.move_to_end(key)
        return True

    def reserve(self, key: ItemKey, num_rows: int, turn: bytes = b"") -> bool:
        """Make room for an item that the tower will compute, and pin it. False if pinned items leave no room.

        An item larger than a tenant's part gets in when nothing else is pinned: it must not wait for ever. It leaves
        others their part nevertheless.
        """
        size = num_rows * self._row_bytes
        if self.pinned_bytes and not self._has_room(size, turn):
            return False
        self.queries += 1
        entry = self._entries[key] = _Entry(size, turn)
        self.size_bytes += size
        self._count_pinned(entry, 1)
        self._shrink()
        return True

    def _has_room(self, size: int, turn: bytes) -> bool:
        total = sum(min(pinned, self._tenant_bytes) for pinned in self._pinned.values())
        return total + size <= self._budget_bytes and self._pinned[turn] + size <= self._tenant_bytes

    def _count_pinned(self, entry: _Entry[Rows], sign: int) -> None:
        self.pinned_bytes += sign * entry.size_bytes
        self._pinned[entry.turn] += sign * entry.size_bytes
        if not self._pinned[entry.turn]:
            del self._pinned[entry.turn]

    def is_awaited(self, key: ItemKey) -> bool:
        """Whether an entry is reserved whose rows do not exist yet."""
        entry = self._entries.get(key)
        return entry is not None and entry.rows is None

    def fill(self, key: ItemKey, rows: Rows) -> None:
        self._entries[key].rows = rows

    def rows(self, key: ItemKey) -> Rows:
        """Rows of a pinned and filled item."""
        rows = self._entries[key].rows
        if rows is None:
            raise KeyError(key)
        return rows

    def unpin(self, key: ItemKey) -> None:
        entry = self._entries[key]
        entry.pins -= 1
        if not entry.pins:
            self._count_pinned(entry, -1)
            if entry.rows is None:  # reserved, never computed
                self._drop(key)
            else:
                self._shrink()

    def _shrink(self) -> None:
        if self.size_bytes <= self._budget_bytes:
            return
        for key in [key for key, entry in self._entries.items() if not entry.pins]:
            self._drop(key)
            if self.size_bytes <= self._budget_bytes:
                return

    def _drop(self, key: ItemKey) -> None:
        self.size_bytes -= self._entries.pop(key).size_bytes

    def check_integrity(self) -> None:
        if self.size_bytes != sum(e.size_bytes for e in self._entries.values()):
            raise KeyError("size of the encoder cache")
        if self.pinned_bytes != sum(e.size_bytes for e in self._entries.values() if e.pins):
            raise KeyError("pins of the encoder cache")
        if self._pinned.total() != self.pinned_bytes:
            raise KeyError("tenants of the encoder cache")
