"""Block pool against a naive model of it, and the encoder cache's arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sensorium.engine.block_pool import BlockPool, BlockPoolError
from sensorium.engine.encoder_cache import EncoderCache

BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """The model: users per block, key per block, and the order in which free blocks were let go."""

    most_known: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, self.most_known)
        self.touched: set[int] = set()
        self.users = [0] * BLOCKS
        self.keys: dict[bytes, int] = {}
        self.released: list[int] = []  # known free blocks, longest ago first

    def used(self) -> list[int]:
        return [block for block in range(BLOCKS) if self.users[block]]

    def key_of(self, block: int) -> bytes | None:
        return next((key for key, value in self.keys.items() if value == block), None)

    @precondition(lambda self: not all(self.users))
    @rule()
    def allocate(self) -> None:
        unknown = {b for b in range(BLOCKS) if not self.users[b] and self.key_of(b) is None}
        block = self.pool.allocate()
        assert not self.users[block]
        kept = BLOCKS if self.most_known is None else self.most_known
        if unknown & self.touched:
            assert block in unknown & self.touched, "a page was touched while there were some that nobody can find"
        elif unknown and len(self.released) <= kept:
            assert block in unknown, "a known block was taken while there were unknown ones"
        else:
            assert block == self.released[0], "not the least recently used"
            self.released.remove(block)
            del self.keys[self.key_of(block) or b""]
        self.users[block] = 1
        self.touched.add(block)

    @precondition(lambda self: all(self.users))
    @rule()
    def allocate_from_nothing(self) -> None:
        with pytest.raises(KeyError):
            self.pool.allocate()

    @rule(number=st.integers(0, 9))
    def retain_found(self, number: int) -> None:
        key = b"%d" % number
        block = self.pool.find(key)
        assert block == self.keys.get(key)
        if block is not None:
            self.pool.retain(block)
            self.users[block] += 1
            if block in self.released:
                self.released.remove(block)

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.used()))
        self.pool.release(block)
        self.users[block] -= 1
        if not self.users[block] and self.key_of(block) is not None:
            self.released.append(block)

    @precondition(lambda self: any(self.users))
    @rule(data=st.data(), number=st.integers(0, 9))
    def publish(self, data: st.DataObject, number: int) -> None:
        block, key = data.draw(st.sampled_from(self.used())), b"%d" % number
        self.pool.publish(block, key)
        if key not in self.keys and self.key_of(block) is None:
            self.keys[key] = block

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.used()))
        self.pool.forget(block)
        self.keys.pop(self.key_of(block) or b"", None)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free + len(self.used()) == BLOCKS
        assert all(self.pool.is_free(block) == (not self.users[block]) for block in range(BLOCKS))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


class FrugalPoolMachine(PoolMachine):
    """Keeps one known block before it touches another page."""

    most_known = 1


FrugalPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFrugalPool = FrugalPoolMachine.TestCase


def test_a_block_released_twice_is_an_error() -> None:
    pool = BlockPool(1)
    pool.release(pool.allocate())
    with pytest.raises(BlockPoolError):
        pool.release(0)


def test_integrity_check_sees_a_lost_block() -> None:
    pool = BlockPool(2)
    pool._references[0] = 1
    with pytest.raises(BlockPoolError):
        pool.check_integrity()


def key(name: str, salt: bytes = b"") -> tuple[bytes, bytes]:
    return salt, name.encode()


def test_pinned_items_stay_and_old_ones_go() -> None:
    cache: EncoderCache[str] = EncoderCache(budget_bytes=100, row_bytes=10)
    for name in "abc":
        assert cache.reserve(key(name), 4)
        cache.fill(key(name), name)
        if name != "a":
            cache.unpin(key(name))
    assert cache.rows(key("a")) == "a"  # pinned, though the oldest
    assert key("b") not in cache  # the oldest that was free to go
    assert key("c") in cache
    assert cache.size_bytes == 80
    cache.check_integrity()


def test_room_is_what_pins_leave() -> None:
    cache: EncoderCache[str] = EncoderCache(budget_bytes=100, row_bytes=10)
    assert cache.reserve(key("a"), 6)
    cache.fill(key("a"), "a")
    assert not cache.reserve(key("b"), 5)
    cache.unpin(key("a"))
    assert cache.reserve(key("b"), 50), "nothing is pinned: an item larger than the budget must get in"
    cache.fill(key("b"), "b")
    assert not cache.reserve(key("c"), 1)
    cache.unpin(key("b"))
    assert cache.size_bytes <= 100
    cache.check_integrity()


def test_an_item_that_was_never_computed_leaves_nothing() -> None:
    cache: EncoderCache[str] = EncoderCache(budget_bytes=100, row_bytes=10)
    assert cache.reserve(key("a"), 3)
    assert cache.pin(key("a"))
    cache.unpin(key("a"))
    cache.unpin(key("a"))
    assert not cache.pin(key("a"))
    assert (cache.size_bytes, cache.pinned_bytes) == (0, 0)


def test_tenants_have_their_own_entries() -> None:
    cache: EncoderCache[str] = EncoderCache(budget_bytes=100, row_bytes=10)
    cache.reserve(key("a", b"one"), 1)
    assert not cache.pin(key("a", b"two"))


def test_few_known_blocks_are_kept_before_another_page_is_touched() -> None:
    pool = BlockPool(BLOCKS, 2)
    for number in range(3):
        pool.publish(pool.allocate(), b"%d" % number)
    for number in range(2):
        pool.release(number)
    assert pool.allocate() == 3  # two are kept
    pool.release(2)
    assert pool.allocate() == 0  # the one that was freed first
