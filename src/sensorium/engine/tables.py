"""How many blocks a sequence holds. It has a table of blocks for each kind of layers; those that look through a window
need only the blocks that a token still sees, and give the others back."""

from __future__ import annotations

from dataclasses import dataclass

KEYS_AT_ONCE = 64
"""Kernels read keys in runs that begin at multiples of this. Those before a window count for nothing, but they must be
numbers: a block that was given back may hold what a step that failed left there."""


@dataclass(frozen=True, slots=True)
class BlockTables:
    """The tables of every sequence of a model, by their windows: tokens that a token sees, itself too, or None."""

    windows: tuple[int | None, ...]
    block_size: int
    step_tokens: int  # of one sequence in a step, at most
    keys_at_once: int = KEYS_AT_ONCE

    @property
    def has_windows(self) -> bool:
        return any(window is not None for window in self.windows)

    def blocks(self, num_tokens: int) -> int:
        """Blocks of one table that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def first(self, window: int | None, position: int) -> int:
        """The first block that is read for a token at `position`; for later tokens none before it is."""
        return (
            0
            if window is None
            else max(position - window + 1, 0) // self.keys_at_once * self.keys_at_once // self.block_size
        )

    def end(self, window: int | None, position: int, num_tokens: int) -> int:
        """Past the last block that a sequence holds whose next token to compute is at `position`: all blocks of its
        tokens, with a window as many as any step reads or writes."""
        total = self.blocks(num_tokens)
        if window is None:
            return total
        return min(total, self.first(window, position) + self.most(window))

    def most(self, window: int) -> int:
        """Blocks that hold what a step reads and writes, wherever they begin."""
        return self.blocks(self.keys_at_once - 1 + window - 1 + self.step_tokens) + 1

    def needed(self, num_tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds at most, in all tables."""
        return sum(self.end(window, 0, num_tokens) for window in self.windows)

    def capacity(self, num_blocks: int, num_tokens: int) -> int:
        """Tokens of sequences of this length that so many blocks hold, in whole blocks; 0 without tables."""
        needed = self.needed(num_tokens)
        return num_blocks * self.blocks(num_tokens) * self.block_size // needed if needed else 0
