"""Outputs of the media towers by content, within a byte budget; least recently used go first, pinned ones never.

A sequence pins an item from when the tower runs (or the item is found) until all its rows are in the KV cache. An entry
may be reserved before its rows exist. Rows are opaque here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from sensorium.engine.sequence import ItemKey

Rows = TypeVar("Rows")


class _Entry(Generic[Rows]):
    __slots__ = ("pins", "rows", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        self.rows: Rows | None = None
        self.size_bytes = size_bytes
        self.pins = 1


class EncoderCache(Generic[Rows]):
    def __init__(self, budget_bytes: int, row_bytes: int) -> None:
        self._budget_bytes = budget_bytes
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
            self.pinned_bytes += entry.size_bytes
        entry.pins += 1
        self._entries.move_to_end(key)
        return True

    def reserve(self, key: ItemKey, num_rows: int) -> bool:
        """Make room for an item that the tower will compute, and pin it. False if pinned items leave no room.

        An item larger than the whole budget gets in when nothing else is pinned: it must not wait for ever.
        """
        size = num_rows * self._row_bytes
        if self.pinned_bytes and self.pinned_bytes + size > self._budget_bytes:
            return False
        self.queries += 1
        self._entries[key] = _Entry(size)
        self.size_bytes += size
        self.pinned_bytes += size
        self._shrink()
        return True

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
            self.pinned_bytes -= entry.size_bytes
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
