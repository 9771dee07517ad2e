"""Drawing tokens natively, against the reference: the same token, or one of those beside the number that was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from sensorium.kernels import RowDraws, reference
from sensorium.kernels.cpu.native import Native

NEAR = 1e-5  # of the whole distribution


@pytest.mark.parametrize("vocab", [1, 31, 128, 1000, 8193])
@pytest.mark.parametrize("spread", [0.1, 1.0, 12.0])
@pytest.mark.parametrize("is_masked", [False, True])
def test_tokens_are_those_of_the_reference(kernels: Native, vocab: int, spread: float, *, is_masked: bool) -> None:
    """Rows in any order, some of them greedy; with a mask that leaves one token, and one that leaves none."""
    rng = np.random.default_rng(vocab)
    logits = (spread * rng.standard_normal((9, vocab))).astype(np.float32)
    logits[2, rng.integers(0, vocab, vocab // 2)] = -np.inf
    rows = np.array([4, 2, 0, 7, 8, 1], np.int64)
    temperatures = np.array([1, 0.7, 0, 1.9, 0, 0.05], np.float32)
    uniforms = np.array([0, 0.5, 0.1, 1 - 2**-32, 0.9, rng.random()])
    masks = None
    if is_masked:
        masks = rng.integers(0, 2**32, (len(rows), -(-vocab // 32)), dtype=np.uint32)
        masks[4] = masks[5] = 0
        masks[5, (vocab - 1) // 32] = 1 << ((vocab - 1) % 32)
    before = logits.copy()
    tokens, highest = kernels.draw_rows(logits, RowDraws(rows, temperatures, uniforms, masks))
    expected, most = reference.draw_rows(logits, RowDraws(rows, temperatures, uniforms, masks))
    assert np.array_equal(highest, most)
    assert np.array_equal(logits, before)
    shifted = [np.clip(uniforms + shift, 0, 1 - 2**-32) for shift in (-NEAR, NEAR)]
    lower, upper = (reference.draw_rows(logits, RowDraws(rows, temperatures, one, masks))[0] for one in shifted)
    assert ((tokens == expected) | ((lower <= tokens) & (tokens <= upper))).all()
    drawn = np.isfinite(most)
    assert np.isfinite(logits[rows, tokens])[drawn].all()
    if masks is not None:
        assert not drawn[4]
        assert tokens[5] == vocab - 1
        assert (masks[np.arange(len(rows)), tokens // 32] >> (tokens % 32) & 1)[drawn].all()


def test_every_token_comes_as_often_as_it_is_likely(kernels: Native) -> None:
    logits = np.log(np.array([[0.5, 1.0, 0.2, 0.3]], np.float32))
    logits[0, 1] = -np.inf
    count = 20_000
    rows, ones = np.zeros(count, np.int64), np.ones(count, np.float32)
    tokens, _ = kernels.draw_rows(logits, RowDraws(rows, ones, (np.arange(count) + 0.5) / count))
    assert (np.bincount(tokens, minlength=4) / count).tolist() == pytest.approx([0.5, 0, 0.2, 0.3], abs=1e-4)


def test_a_part_of_wider_rows(kernels: Native) -> None:
    """Logits whose rows do not lie one after the other, and such whose columns do not."""
    wide = np.random.default_rng(3).standard_normal((6, 400)).astype(np.float32)
    rows, temperatures, uniforms = np.arange(6), np.ones(6, np.float32), np.linspace(0.1, 0.9, 6)
    for logits in (wide[:, :300], wide[:, ::2]):
        expected, _ = reference.draw_rows(np.ascontiguousarray(logits), RowDraws(rows, temperatures, uniforms))
        assert kernels.draw_rows(logits, RowDraws(rows, temperatures, uniforms))[0].tolist() == expected.tolist()
