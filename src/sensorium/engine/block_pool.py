"""Blocks of the KV cache as numbers: who uses them, which are free, and which still hold a known prefix.

Every operation is O(1). A block is either used (reference count > 0) or free; a free block may stay known by its prefix
key until it is handed out again. Handed out are, in this order: blocks that nobody can find, so that few pages of the
cache are touched; blocks that were never used; the rest, least recently freed first. A pool that keeps only some known
blocks uses the rest before it touches new ones.
"""

from __future__ import annotations

from collections import OrderedDict

from sensorium.errors import ServerError


class BlockPoolError(ServerError):
    """A promise of the pool was broken. This is a bug."""


class BlockPool:
    def __init__(self, num_blocks: int, most_known: int | None = None) -> None:
        """`most_known`: free blocks beyond so many are handed out before those that were never used."""
        self.num_blocks = num_blocks
        self._most_known = num_blocks if most_known is None else most_known
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()  # once used: those without key first, then by time
        self._num_touched = 0  # blocks from this number on were never used

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_blocks - self._num_touched

    def is_free(self, block: int) -> bool:
        return not self._references[block]

    def allocate(self) -> int:
        """A block for the caller alone; what it held is forgotten. KeyError when none is free."""
        block = next(iter(self._free), self._num_touched)
        is_new = block == self._num_touched or (self._keys[block] is not None and len(self._free) <= self._most_known)
        if is_new and self._num_touched < self.num_blocks:
            block = self._num_touched
            self._num_touched += 1
        else:
            del self._free[block]
            self.forget(block)
        self._references[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more user of a block that `find` returned."""
        if not self._references[block]:
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        count = self._references[block] - 1
        if count < 0:
            raise BlockPoolError(f"block {block} released twice")
        self._references[block] = count
        if not count:
            self._free[block] = None
            if self._keys[block] is None:
                self._free.move_to_end(block, last=False)

    def find(self, key: bytes) -> int | None:
        return self._by_key.get(key)

    def publish(self, block: int, key: bytes) -> None:
        """Make a used, completely computed block findable. The first block with a key keeps it."""
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> None:
        """Its content must not be found again."""
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
            if block in self._free:
                self._free.move_to_end(block, last=False)

    def check_integrity(self) -> None:
        """Every block in exactly one state, every key pointing both ways."""
        for block, count in enumerate(self._references):
            if (count == 0) != (block in self._free or block >= self._num_touched) or count < 0:
                raise BlockPoolError(f"block {block} has {count} users, and free is {block in self._free}")
        known = {key: block for block, key in enumerate(self._keys) if key is not None}
        if known != self._by_key:
            raise BlockPoolError("keys and blocks disagree")
