"""Keys of cached blocks: equal for equal content in every process, different for everything that matters."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.engine.block_pool import BlockPool
from sensorium.engine.prefix_cache import PrefixCache, block_key, root_key
from sensorium.engine.sequence import Sequence
from sensorium.engine.tables import BlockTables
from sensorium.types import EngineRequest, MediaFeatures, MediaSpan, Prompt, SamplingParams

BLOCK = 8


def keys(
    prompt: Prompt,
    *,
    salt: bytes = b"",
    identity: bytes = b"model",
    outputs: tuple[int, ...] = (),
    is_long: bool = False,
) -> list[bytes]:
    """Keys of all full blocks of a prompt and the tokens generated after it."""
    seq = Sequence(EngineRequest(1, prompt, SamplingParams(64), salt=salt), 0)
    seq.is_long = is_long
    for token in outputs:
        seq.append(token)
    cache = PrefixCache(BlockPool(1), BlockTables((None,), BLOCK, 1), identity)
    return [cache.key(seq, index) for index in range(seq.num_tokens // BLOCK)]


def prompt(length: int = 40, media: tuple[tuple[int, int, str], ...] = (), **fields: Any) -> Prompt:
    spans = tuple(MediaSpan(i, offset, rows) for i, (offset, rows, _) in enumerate(media))
    features = tuple(MediaFeatures("image", name.encode(), rows) for _, rows, name in media)
    return Prompt(np.arange(length, dtype=np.int32), features, spans, **fields)


def test_keys_are_full_sha256_and_stable() -> None:
    """S74; and the value itself, so that a change of the framing is seen."""
    made = keys(prompt(16), salt=b"tenant")
    assert [len(key) for key in made] == [32, 32]
    assert (
        made[0].hex()
        == subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout.split()[0]
    )


PROGRAM = """
import numpy as np
from sensorium.engine.prefix_cache import block_key, root_key
parent = root_key(b"model", b"tenant")
for tokens in (np.arange(8), np.arange(8, 16)):
    parent = block_key(parent, tokens.astype("<i4").tobytes(), [], b"")
    print(parent.hex())
"""


def test_no_process_has_keys_of_its_own() -> None:
    """S71: Python's hash seed plays no part."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 2


@pytest.mark.parametrize(
    "other", [{"salt": b"other"}, {"identity": b"other"}, {"salt": b"", "identity": b"modeltenant"}, {"is_long": True}]
)
def test_model_tenant_and_rope_are_part_of_every_key(other: dict[str, Any]) -> None:
    base: dict[str, Any] = {"salt": b"tenant", "identity": b"model"}
    assert not set(keys(prompt(), **base)) & set(keys(prompt(), **{**base, **other}))


def test_a_block_depends_on_all_before_it() -> None:
    tokens = np.arange(40, dtype=np.int32)
    changed = tokens.copy()
    changed[9] = 1000
    first, second = keys(Prompt(tokens)), keys(Prompt(changed))
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False, False, False]


def test_media_count_from_the_block_where_they_begin() -> None:
    """Two pictures of the same size share what stands before them and nothing else (also S72, S74)."""
    a, b = keys(prompt(media=((10, 20, "a"),))), keys(prompt(media=((10, 20, "b"),)))
    none = keys(prompt())
    assert [x == y for x, y in zip(a, b, strict=True)] == [True, False, False, False, False]
    assert a[0] == none[0]
    assert not set(a[1:]) & set(none)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((10, 3, "a"),), ((11, 3, "a"),)),  # elsewhere in the block
        (((10, 3, "a"),), ((10, 4, "a"),)),  # more of it
        (((10, 2, "a"), (12, 2, "b")), ((10, 2, "b"), (12, 2, "a"))),  # in another order
        (((10, 2, "a"), (12, 2, "b")), ((10, 4, "ab"),)),
    ],
)
def test_place_length_and_order_of_media_matter(first: Any, second: Any) -> None:
    assert keys(prompt(media=first))[1] != keys(prompt(media=second))[1]


def test_the_row_of_a_span_matters() -> None:
    one = prompt(media=((10, 20, "a"),))
    other = replace(one, spans=(replace(one.spans[0], row=5),))
    assert keys(one)[1] != keys(other)[1]


def test_only_positions_that_differ_from_the_usual_matter() -> None:
    usual = np.arange(40, dtype=np.int32)[None].repeat(3, 0)
    late = usual.copy()
    late[1, 20] += 1
    plain = keys(prompt())
    assert keys(prompt(positions=usual)) == plain
    moved = keys(prompt(positions=late))
    assert moved[:2] == plain[:2]
    assert not set(moved[2:]) & set(plain)


def test_generated_tokens_have_the_keys_they_get_as_prompt() -> None:
    """The next turn of a conversation with a picture finds the answer's blocks."""
    positions = np.concatenate(
        (
            np.arange(10)[None].repeat(3, 0),
            np.array([[10] * 9, [10, 11, 12] * 3, [10] * 9]),
            np.arange(13, 16)[None].repeat(3, 0),
        ),
        axis=1,
    ).astype(np.int32)
    media = ((10, 9, "a"),)
    delta = 16 - 22
    first = prompt(22, media, positions=positions, position_delta=delta)
    answer = tuple(range(22, 50))
    tail = (np.arange(22, 50) + delta)[None].repeat(3, 0)
    longer = np.concatenate((positions, tail), axis=1).astype(np.int32)
    second = prompt(50, media, positions=longer, position_delta=delta)
    assert keys(first, outputs=answer) == keys(second)


Parts = st.tuples(
    st.binary(max_size=6),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.binary(max_size=3)), max_size=2),
    st.binary(max_size=6),
)


@given(Parts, Parts)
def test_framing_is_injective(a: Any, b: Any) -> None:
    """No two contents give the same bytes to the hash, however their parts are cut."""
    parent = root_key(b"m", b"s")
    assert (block_key(parent, *a) == block_key(parent, *b)) == (a == b)


@given(st.tuples(st.binary(max_size=4), st.binary(max_size=4)), st.tuples(st.binary(max_size=4), st.binary(max_size=4)))
def test_framing_of_the_root_is_injective(a: tuple[bytes, bytes], b: tuple[bytes, bytes]) -> None:
    assert (root_key(*a) == root_key(*b)) == (a == b)
    assert root_key(*a, is_long=True) != root_key(*b)
    assert root_key(*a, stretched=40) != root_key(*a, stretched=41)
    assert root_key(*a, stretched=40) != root_key(*b)


def test_many_random_blocks_do_not_collide() -> None:
    rng = np.random.default_rng(0)
    parent = root_key(b"m", b"")
    blocks = rng.integers(0, 4, (20_000, 8)).astype(np.int32)
    distinct = {row.tobytes() for row in blocks}
    assert len({block_key(parent, row, [], b"") for row in distinct}) == len(distinct)
