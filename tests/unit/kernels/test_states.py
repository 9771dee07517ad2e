"""Layers that keep a state: the native kernels against plain torch, and prompts that are cut in any way."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.context import Segments
from sensorium.kernels.cpu.native import Native

BF16 = torch.bfloat16


def segments(lengths: list[int], singles: int, sources: list[int], targets: list[int]) -> Segments:
    return Segments(lengths, singles, torch.tensor(sources), torch.tensor(targets))


# Three decodes, a prompt of one token, one of 70, and a sequence whose second run goes on from its first.
MIXED = segments([1, 1, 1, 1, 70, 5, 40], 3, [3, 0, 4, 0, 6, 0, 9], [1, 2, 5, 7, 8, 9, 10])
TOKENS = sum(MIXED.lengths)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    learned: Tensor


def inputs(tokens: int, key_heads: int, group: int, key_dim: int, value_dim: int) -> Inputs:
    """Views of one tensor; heads that forget at once and such that forget nothing."""
    heads = key_heads * group
    widths = [key_heads * key_dim, key_heads * key_dim, heads * value_dim]
    q, k, v = (3 * torch.randn(tokens, sum(widths))).to(BF16).split(widths, 1)
    decay = -torch.tensor([0.0, 0.01, 1.0, 50.0]).repeat(heads)[:heads] * torch.rand(tokens, heads)
    shapes = [(tokens, key_heads, key_dim), (tokens, key_heads, key_dim), (tokens, heads, value_dim)]
    q, k, v = (one.view(shape) for one, shape in zip((q, k, v), shapes, strict=True))
    return Inputs(q, k, v, decay, torch.rand(tokens, heads))


@pytest.mark.parametrize(
    ("key_heads", "group", "key_dim", "value_dim"), [(2, 1, 128, 128), (1, 4, 32, 80), (3, 2, 6, 5), (2, 2, 20, 64)]
)
def test_the_delta_rule_is_that_of_plain_torch(
    kernels: Native, key_heads: int, group: int, key_dim: int, value_dim: int
) -> None:
    given = inputs(TOKENS, key_heads, group, key_dim, value_dim)
    states = torch.randn(11, key_heads * group, key_dim, value_dim)
    states[0] = 0
    theirs = states.clone()
    out = kernels.delta_rule(*given, states, MIXED)
    expected = reference.delta_rule(*given, theirs, MIXED)
    assert out.dtype is BF16
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(states, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("channels", "taps", "bias"), [(600, 4, False), (37, 3, True), (256, 1, True)])
def test_the_convolution_is_that_of_plain_torch(
    kernels: Native, channels: int, taps: int, *, bias: bool, silu: bool
) -> None:
    x = torch.randn(TOKENS, channels + 9).to(BF16)[:, 4 : channels + 4]
    weight, added = torch.randn(channels, taps).to(BF16), torch.randn(channels).to(BF16) if bias else None
    states = torch.randn(11, taps - 1, channels).to(BF16)
    theirs = states.clone()
    out = kernels.causal_conv(x, weight, added, states, MIXED, silu=silu)
    expected = reference.causal_conv(x, weight, added, theirs, MIXED, silu=silu)
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.01, atol=0.01)
    assert torch.equal(states, theirs)


def test_a_prompt_may_be_cut_anywhere(kernels: Native) -> None:
    """To the last bit, in whatever company."""
    given, x = inputs(90, 2, 2, 16, 24), torch.randn(90, 40).to(BF16)
    weight = torch.randn(40, 4).to(BF16)
    found = []
    for lengths in ([90], [1] * 90, [33, 1, 56], [64, 26]):
        memory, rows = torch.randn(91, 4, 16, 24), torch.zeros(91, 3, 40).to(BF16)
        memory[0] = 0
        places = list(range(len(lengths) + 1))
        runs = segments(lengths, 0, places[:-1], places[1:])
        read = kernels.delta_rule(*given, memory, runs)
        found.append((read, memory[len(lengths)], kernels.causal_conv(x, weight, None, rows, runs), rows[len(lengths)]))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(kernels: Native) -> None:
    given, x = inputs(TOKENS, 4, 2, 64, 64), torch.randn(TOKENS, 900).to(BF16)
    weight, threads, found = torch.randn(900, 4).to(BF16), kernels.threads, []
    before, rows = torch.randn(11, 8, 64, 64), torch.randn(11, 3, 900).to(BF16)
    for count in (1, 3):
        kernels.set_threads(count)
        memory, states = before.clone(), rows.clone()
        made = kernels.delta_rule(*given, memory, MIXED), kernels.causal_conv(x, weight, None, states, MIXED)
        found.append((*made, memory, states))
    kernels.set_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(("heads", "dim"), [(4, 128), (3, 20)])
def test_what_stands_around_the_rule_is_that_of_plain_torch(kernels: Native, heads: int, dim: int) -> None:
    gates = (20 * torch.randn(50, 2 * heads)).to(BF16)
    rate, bias = torch.randn(heads), torch.randn(heads)
    for one, two in zip(kernels.delta_gates(gates, rate, bias), reference.delta_gates(gates, rate, bias), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    x, z = torch.randn(50, heads, dim).to(BF16), torch.randn(50, heads * dim + 8).to(BF16)[:, 8:]
    weight = torch.rand(dim).to(BF16)
    got, expected = kernels.norm_gated(x, z, weight, 1e-6), reference.norm_gated(x, z, weight, 1e-6)
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=1e-3)
